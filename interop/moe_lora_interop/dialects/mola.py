"""MoLA (arXiv:2402.08562): E, k and r differ by layer; k is not in the files."""

from moe_lora_interop.rules.codecs import PER_LAYER
from moe_lora_interop.rules.dialect import Dialect, Field, Option
from moe_lora_interop.rules.lora_fields import INERT, LORA
from moe_lora_interop.rules.tensors import Rule

_PREFIX = "base_model.model.{module}"

MOLA = Dialect(
    name="mola",
    source="GCYZSL/MoLA@01785c84, src/mola_lora_hacked.py",
    rules=(
        Rule("lora_A", f"{_PREFIX}.lora_A_{{expert}}.weight", "rank in"),
        Rule("lora_B", f"{_PREFIX}.lora_B_{{expert}}.weight", "out rank"),
        Rule("router", f"{_PREFIX}.router.router.weight", "logit in"),
    ),
    fields=(Field("r", "r", PER_LAYER), *LORA),
    const={"peft_type": ("LORA",), "bias": ("none",)},
    ignore=INERT,
    options=(Option("top_k", "experts kept per token: a number, or a list with one per layer", PER_LAYER),),
    experts_from_tensors=True,
    weights="adapter_model.bin",
    notes="softmax, top-k, renormalised; E, k and r by layer; top_k is not stored",
)
