"""LoRAMoE (arXiv:2312.09979): E experts and a dense softmax router on every target layer; LD-MoLE without sparsegen."""

from moe_lora_interop.rules.dialect import Dialect, Field
from moe_lora_interop.rules.lora_fields import INERT, LORA
from moe_lora_interop.rules.tensors import Rule

# of LD-MoLE (eshentw/LD-MoLE@d7b7425), which borrows these keys; `lora_fields.CHECKED` says when they mean more
_LD_MOLE = frozenset({"sparsegen_cfg", "sparsegen_init", "lora_freeze", "router_freeze", "modules_to_save"})

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
    const={"peft_type": ("LORA",), "bias": ("none",)},
    ignore=INERT | _LD_MOLE,
    weights="adapter_model.bin",
    notes="dense softmax only; one E, r and alpha for all modules",
)
