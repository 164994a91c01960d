"""PEFT's ordinary LoRA (arXiv:2106.09685): a mixture of one expert, without a router."""

from moe_lora_interop.rules.base_tensors import BASE_TENSORS
from moe_lora_interop.rules.dialect import Dialect, Field
from moe_lora_interop.rules.lora_fields import INERT, LORA
from moe_lora_interop.rules.tensors import Rule

_PREFIX = "base_model.model.{module}"

PLAIN_LORA = Dialect(
    name="lora",
    source="PyPI peft 0.21.2, tuners/lora",
    rules=(
        Rule("lora_A", f"{_PREFIX}.lora_A.weight", "rank in"),
        Rule("lora_B", f"{_PREFIX}.lora_B.weight", "out rank"),
        *BASE_TENSORS,
    ),
    needs=frozenset({"lora_A", "lora_B"}),
    fields=(
        Field("r", "r"),
        Field("use_rslora", "use_rslora", default=False),
        Field("rank_pattern", "rank_pattern", default={}),
        Field("alpha_pattern", "alpha_pattern", default={}),
        *LORA,
    ),
    fixed={"num_experts": 1},
    const={"peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "lora_bias": (False,)},
    ignore=INERT,
    notes="one expert, no router; no DoRA, biases, modules_to_save or embeddings",
)
