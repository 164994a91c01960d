"""LoRAMoE (arXiv:2312.09979): E experts and a dense softmax router on every target layer."""

from moe_lora_interop.rules.dialect import Dialect, Field
from moe_lora_interop.rules.lora_fields import INERT, LORA
from moe_lora_interop.rules.tensors import Rule

_PREFIX = "base_model.model.{module}"

LORAMOE = Dialect(
    name="loramoe",
    source="Ablustrund/LoRAMoE, peft/tuners/lora.py",
    rules=(
        Rule("lora_A", f"{_PREFIX}.lora_A{{expert}}.weight", "rank in"),
        Rule("lora_B", f"{_PREFIX}.lora_B{{expert}}.weight", "out rank"),
        Rule("router", f"{_PREFIX}.lora_route.weight", "logit in"),
    ),
    fields=(
        Field("num_experts", "lora_nums"),
        Field("r", "r"),
        Field("router_aux_loss_coef", "blc_weight", default=0.0),
        Field("router_aux_loss_delta", "blc_alpha", default=0.0),
        *LORA,
    ),
    fixed={"router_aux_loss": "localized"},
    const={"peft_type": ("LORA",), "bias": ("none",), "sparsegen_cfg": ()},  # LD-MoLE borrows these keys
    ignore=INERT,
    weights="adapter_model.bin",
    notes="dense softmax only; one E, r and alpha for all modules",
)
