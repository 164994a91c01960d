"""MoE-PEFT, MixLoRA (arXiv:2404.15159) and DynMoLE: keys without PEFT's prefix; attention may be plain LoRA."""

from moe_lora_interop.rules.codecs import FROM_ONE_NULL, LAST_PARTS
from moe_lora_interop.rules.dialect import Dialect, Field
from moe_lora_interop.rules.lora_fields import INERT, LORA
from moe_lora_interop.rules.tensors import Rule

_SOURCE = "TUDB-Labs/MoE-PEFT (PyPI moe-peft 2.0.2)"
_FIELDS = (
    Field("num_experts", "num_experts"),
    Field("r", "r"),
    Field("use_rslora", "use_rslora", default=False),
    Field("target_modules", "target_modules", LAST_PARTS),
    *(field for field in LORA if field.ours != "target_modules"),
)
# how the router began
_INERT = INERT | {"router_init_range"}


def _experts(method: str) -> tuple[Rule, ...]:
    key, module = f"{method}.layers.{{layer}}.{{path}}", "model.layers.{layer}.{path}"
    return (
        Rule("lora_A", f"{key}.experts.{{expert}}.lora_A.weight", "rank in", module),
        Rule("lora_B", f"{key}.experts.{{expert}}.lora_B.weight", "out rank", module),
        Rule("router", f"{key}.moe_gate.weight", "logit in", module),
    )


def _plain(method: str) -> tuple[Rule, ...]:
    key, module = f"{method}.layers.{{layer}}.self_attn.{{path}}", "model.layers.{layer}.self_attn.{path}"
    return (
        Rule("lora_A", f"{key}.lora_A.weight", "rank in", module),
        Rule("lora_B", f"{key}.lora_B.weight", "out rank", module),
    )


MOE_PEFT_LORAMOE = Dialect(
    name="moe-peft-loramoe",
    source=_SOURCE,
    rules=_experts("loramoe") + _plain("loramoe"),
    fields=_FIELDS,
    const={"peft_type": ("LORAMOE",), "routing_strategy": ("loramoe",), "bias": ("none",), "use_dora": (False,)},
    ignore=_INERT,
    plain=True,
    weights="adapter_model.bin",
    notes="dense softmax on the feed-forward layers, plain LoRA on attention; one E, r and alpha",
)

MOE_PEFT_MOLA = Dialect(
    name="moe-peft-mola",
    source=_SOURCE,
    rules=_experts("mola"),
    fields=(*_FIELDS, Field("top_k", "top_k")),
    const={"peft_type": ("MOLA",), "routing_strategy": ("mola",), "bias": ("none",), "use_dora": (False,)},
    ignore=_INERT,
    weights="adapter_model.bin",
    notes="softmax, top-k, renormalised; one E, k, r and alpha for all modules",
)

DYNMOLE = Dialect(
    name="dynmole",
    source="mikecovlee/DynMoLE@2f428d3, a fork of MoE-PEFT",
    rules=_experts("dynmole"),
    fields=(
        *_FIELDS,
        Field("top_k", "keep_top_k"),
        Field("top_p", "top_p"),
        Field("entropy_threshold", "entropy_threshold", FROM_ONE_NULL),
        Field("entropy_index", "entropy_index"),
        Field("entropy_eps", "entropy_eps"),
    ),
    fixed={"norm_topk_prob": False},
    const={"peft_type": ("DYNMOLE",), "routing_strategy": ("dynmole",), "bias": ("none",)},
    ignore=_INERT,
    weights="adapter_model.bin",
    notes="softmax, top-k, top-p and an entropy above which all experts are kept, not renormalised; one E, k, r and "
    "alpha for all modules",
)

_MIXLORA_CONST = {"peft_type": ("MIXLORA",), "bias": ("none",), "use_dora": (False,)}

MIXLORA = Dialect(
    name="mixlora",
    source=f"{_SOURCE} and TUDB-Labs/MixLoRA",
    rules=_experts("mixlora") + _plain("mixlora"),
    fields=(*_FIELDS, Field("top_k", "top_k")),
    fixed={"scope": "ffn"},
    const={**_MIXLORA_CONST, "routing_strategy": ("mixlora",)},
    ignore=_INERT | {"act_fn"},
    plain=True,
    weights="adapter_model.bin",
    notes="one softmax, top-k, renormalised router per feed-forward block, plain LoRA on attention; one E, k, r, "
    "alpha; act_fn must be what the base has",
)

_LEGACY = "mixlora.layers.{layer}.experts.{expert}"

MIXLORA_LEGACY = Dialect(
    name="mixlora-legacy",
    source="TUDB-Labs/MixLoRA, misc/legacy_weights_convertor.py",
    rules=(
        *(
            Rule(role, f"{_LEGACY}.{old}_proj.{role}.weight", axes, f"model.layers.{{layer}}.mlp.{new}_proj")
            for old, new in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
            for role, axes in (("lora_A", "rank in"), ("lora_B", "out rank"))
        ),
        Rule("router", "mixlora.layers.{layer}.gate.weight", "logit in", "model.layers.{layer}.mlp"),
        *_plain("mixlora"),
    ),
    fields=(*_FIELDS, Field("top_k", "top_k")),
    fixed={"scope": "ffn"},
    const={**_MIXLORA_CONST, "routing_strategy": ("mixtral", "mixlora")},
    ignore=_INERT | {"act_fn"},
    plain=True,
    weights="adapter_model.bin",
    notes="as mixlora, with the older names w1, w2, w3 of the feed-forward layers",
)
