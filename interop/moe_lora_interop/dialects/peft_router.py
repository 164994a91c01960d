"""LoRA experts and a global `router.*` in one file: a blog post's layout, which stock PEFT loads without the router."""

from moe_lora_interop.rules.base_tensors import BASE_TENSORS
from moe_lora_interop.rules.dialect import Dialect, Field, Option
from moe_lora_interop.rules.lora_fields import INERT, LORA
from moe_lora_interop.rules.tensors import Rule

_PREFIX = "base_model.model.{module}"

PEFT_ROUTER = Dialect(
    name="peft-router",
    source="get_peft_model_state_dict plus router.*, PyPI peft 0.21.2",
    rules=(
        Rule("lora_A", f"{_PREFIX}.lora_A.expert_{{expert}}.weight", "rank in"),
        Rule("lora_B", f"{_PREFIX}.lora_B.expert_{{expert}}.weight", "out rank"),
        # what get_peft_model_state_dict writes for one adapter: then experts are missing, and reading says so
        Rule("lora_A", f"{_PREFIX}.lora_A.weight", "rank in"),
        Rule("lora_B", f"{_PREFIX}.lora_B.weight", "out rank"),
        Rule("router_0", "router.weight", "unit in", module=""),
        Rule("router_bias_0", "router.bias", "unit", module=""),
        *BASE_TENSORS,
    ),
    needs=frozenset({"lora_A", "lora_B", "router_0"}),
    fields=(Field("r", "r"), Field("use_rslora", "use_rslora", default=False), *LORA),
    fixed={"scope": "model"},
    const={"peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,)},
    ignore=INERT,
    options=(
        Option("router_input", 'what the router reads: "hidden", the last hidden state of a first pass'),
        Option("top_k", "experts kept per token; null for dense routing"),
        Option("router_bias", "whether the router has a bias", default=True),
        Option("norm_topk_prob", "whether kept weights are divided by their sum", default=True),
        Option("router_temperature", "divides the router's logits", default=1.0),
    ),
    experts_from_tensors=True,
    hint="get_peft_model_state_dict writes one adapter: if the router has a row for each of several, the other experts "
    "were lost when this was saved",
    notes="one linear softmax router for the model; neither its input nor the selection is stored",
)
