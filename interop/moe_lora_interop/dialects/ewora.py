"""EWoRA, proposed to PEFT: the router reads what the experts make of the input, and its scores have signs."""

from moe_lora_interop.rules.base_tensors import BASE_TENSORS
from moe_lora_interop.rules.codecs import UNSCALED, UNSCALED_PATTERN
from moe_lora_interop.rules.dialect import Dialect, Field
from moe_lora_interop.rules.lora_fields import BOOKKEEPING, INERT, TARGETS
from moe_lora_interop.rules.tensors import Rule

_PREFIX = "base_model.model.{module}"

EWORA = Dialect(
    name="ewora",
    source="huggingface/peft#3401@a3e8827, tuners/ewora/layer.py",
    rules=(
        Rule("lora_A", f"{_PREFIX}.ewora_As", "expert in rank"),
        Rule("lora_B", f"{_PREFIX}.ewora_Bs", "expert rank out"),
        Rule("router", f"{_PREFIX}.ewora_weighting.weight", "logit in"),
        Rule("router_bias", f"{_PREFIX}.ewora_weighting.bias", "logit"),
        *BASE_TENSORS,
    ),
    needs=frozenset({"lora_A", "lora_B", "router", "router_bias"}),
    fields=(
        Field("num_experts", "num_experts"),
        Field("r", "r", UNSCALED),
        Field("rank_pattern", "rank_pattern", UNSCALED_PATTERN, default={}),
        Field("lora_dropout", "ewora_dropout", default=0.0),
        *TARGETS,
        *BOOKKEEPING,
    ),
    fixed={
        "router_input": "expert_activations",
        "router_bias": True,
        "scoring_func": "identity",
        "norm_topk_prob": False,
    },
    const={"peft_type": ("EWORA",), "bias": ("none",)},
    ignore=INERT,
    notes="signed scores of the rectified codes A x, all experts; alpha / r is always 1; one E, r by module",
)
