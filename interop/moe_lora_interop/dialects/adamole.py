"""AdaMoLE and MoLE (arXiv:2405.00361), and GOAT (arXiv:2502.16894), which borrows their keys."""

from moe_lora_interop.rules.codecs import DEFAULT_SHARE, TIMES_EXPERTS
from moe_lora_interop.rules.dialect import SET, Dialect, Field
from moe_lora_interop.rules.lora_fields import INERT, LORA
from moe_lora_interop.rules.tensors import Rule

_PREFIX = "base_model.model.{module}"
_SOURCE = "zefang-liu/AdaMoLE@5e8599a7"
_EXPERTS = (
    Rule("lora_A", f"{_PREFIX}.lora_A.{{expert}}.weight", "rank in"),
    Rule("lora_B", f"{_PREFIX}.lora_B.{{expert}}.weight", "out rank"),
    Rule("router", f"{_PREFIX}.lora_gating.weight", "logit in"),
    # PEFT's substring filter saved the same tensors a second time; their own loader ignores these
    Rule("lora_A", f"{_PREFIX}.moe_layer.experts.{{expert}}.lora_A.weight", "rank in", copy="same"),
    Rule("lora_B", f"{_PREFIX}.moe_layer.experts.{{expert}}.lora_B.weight", "out rank", copy="same"),
)
_FIELDS = (Field("num_experts", "num_experts"), Field("r", "lora_rank"), *LORA)
# of GOAT's init types; "default" it refuses, but files that were converted before have it
_ALPHA_OVER_RANK = ("mole", "lora", "lora_scale", "default")
_CASES = (
    ({"top_k": SET, "threshold": None}, {"top_k": SET, "threshold": None}),
    ({"top_k": None, "threshold": SET}, {"top_k": None, "threshold": SET}),
)

MOLE = Dialect(
    name="mole",
    source=f"{_SOURCE}, src/mole/layer.py",
    rules=_EXPERTS,
    fields=(*_FIELDS, Field("top_k", "top_k", default=None), Field("threshold", "threshold", default=None)),
    const={"peft_type": ("MOLE",), "bias": ("none",)},
    cases=_CASES,
    ignore=INERT,
    weights="adapter_model.bin",
    notes="softmax with top-k or a fixed threshold, renormalised; one E, r and alpha for all modules",
)

ADAMOLE = Dialect(
    name="adamole",
    source=f"{_SOURCE}, src/adamole/layer.py",
    rules=(
        *_EXPERTS,
        Rule("threshold", f"{_PREFIX}.lora_threshold.weight", "one in"),
        Rule("threshold_bias", f"{_PREFIX}.lora_threshold.bias", "one"),
    ),
    needs=frozenset({"lora_A", "lora_B", "router", "threshold"}),
    fields=(*_FIELDS, Field("threshold", "max_threshold", DEFAULT_SHARE, default=None)),
    fixed={"adaptive_threshold": True},
    const={"peft_type": ("ADAMOLE",), "bias": ("none",)},
    ignore=INERT,
    weights="adapter_model.bin",
    notes="softmax with a learned threshold that is subtracted, renormalised; one E, r and alpha for all modules",
)

GOAT = Dialect(
    name="goat",
    source="Facico/GOAT-PEFT, goat/peta/src/goat/layer.py",
    rules=_EXPERTS,
    fields=(
        Field("num_experts", "num_experts"),
        Field("r", "r", TIMES_EXPERTS),
        Field("top_k", "top_k"),
        *LORA,
    ),
    const={"peft_type": ("GOAT",), "bias": ("none",), "init_type": _ALPHA_OVER_RANK, "use_dora": (False,)},
    ignore=INERT | {"init_cof"},
    weights="adapter_model.bin",
    notes="softmax, top-k, renormalised; only an init_type that leaves the base as it is and scales by alpha / r, as "
    "its program does unless the environment variable SCALING is set; no file has that",
)
