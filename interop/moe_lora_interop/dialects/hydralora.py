"""HydraLoRA (arXiv:2404.19245): one A, E B's, and a dense softmax router on every target layer."""

from moe_lora_interop.rules.dialect import Dialect, Field
from moe_lora_interop.rules.lora_fields import INERT, LORA
from moe_lora_interop.rules.tensors import Rule

_PREFIX = "base_model.model.{module}"

HYDRALORA = Dialect(
    name="hydralora",
    source="Clin0212/HydraLoRA@afb693bc, HydraLoRA/peft/tuners/lora.py",
    rules=(
        Rule("lora_A", f"{_PREFIX}.lora_A.weight", "rank in"),
        Rule("lora_B", f"{_PREFIX}.lora_B{{expert}}.weight", "out rank"),
        Rule("router", f"{_PREFIX}.lora_route.weight", "logit in"),
    ),
    fields=(Field("num_experts", "lora_nums"), Field("r", "r"), *LORA),
    fixed={"shared_lora_A": True},
    const={"peft_type": ("LORA",), "bias": ("none",)},
    ignore=INERT | {"blc_alpha", "blc_weight"},  # of a loss in training that is always zero
    weights="adapter_model.bin",
    notes="dense softmax and one shared A only; one E, r and alpha for all modules",
)
