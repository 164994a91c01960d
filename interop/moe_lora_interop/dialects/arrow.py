"""PEFT's Arrow routing (arXiv:2405.11157): one folder per task LoRA; the router rows are their prototypes."""

from moe_lora_interop.rules.codecs import ONE_FOR_ALL, PER_EXPERT
from moe_lora_interop.rules.dialect import Dialect, Field, Folders, Option
from moe_lora_interop.rules.lora_fields import BOOKKEEPING, INERT
from moe_lora_interop.rules.tensors import Rule

_KEY = "{expert}/base_model.model.{module}"

ARROW = Dialect(
    name="arrow",
    source="PyPI peft 0.21.2, tuners/lora/arrow.py",
    rules=(
        Rule("lora_A", f"{_KEY}.lora_A.weight", "rank in"),
        Rule("lora_B", f"{_KEY}.lora_B.weight", "out rank"),
        Rule("router", "sidecar/{module}", "logit in"),
        # what PEFT saves for the router is a default LoRA that no forward pass uses
        Rule("lora_A", "main/base_model.model.{module}.lora_A.weight", "rank in", copy="dead"),
        Rule("lora_B", "main/base_model.model.{module}.lora_B.weight", "out rank", copy="dead"),
    ),
    needs=frozenset({"lora_A", "lora_B"}),
    fields=(
        Field("num_experts", "num_experts"),
        Field("r", "experts.r", PER_EXPERT),
        Field("lora_alpha", "experts.lora_alpha", PER_EXPERT),
        Field("lora_dropout", "experts.lora_dropout", ONE_FOR_ALL, default=0.0),
        Field("use_rslora", "experts.use_rslora", ONE_FOR_ALL, default=False),
        Field("target_modules", "experts.target_modules", ONE_FOR_ALL),
        Field("top_k", "arrow_config.top_k"),
        Field("router_temperature", "arrow_config.router_temperature"),
        *BOOKKEEPING,
    ),
    fixed={"scoring_func": "abs_softmax"},
    const={"peft_type": ("LORA",), "bias": ("none",), "arrow_config.use_gks": (False,)},
    ignore=INERT
    | {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"}  # of that default LoRA
    | {"arrow_config.gks_adapter_names"}  # read only with use_gks
    | {
        "arrow_config.rng_seed"
    },  # of the power iteration that finds the prototypes, which are given or computed exactly
    options=(Option("prototypes", "an .npz file {module: [expert, in]} of the router's rows", default=None),),
    folders=Folders("arrow_config.task_adapter_names", "arrow_router", "task_{expert}", sidecar="prototypes.npz"),
    notes="|x.v|, top-k, then softmax; prototypes are not stored by PEFT: an option, a prototypes.npz, or exact SVD",
)
