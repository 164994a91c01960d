"""Fields that many layouts share: most are forks of PEFT's LoRA."""

from collections.abc import Callable, Mapping
from typing import Any

from moe_lora_interop.rules.dialect import Field

TARGETS = (
    Field("target_modules", "target_modules"),
    Field("exclude_modules", "exclude_modules", default=None),
    Field("layers_to_transform", "layers_to_transform", default=None),
    Field("layers_pattern", "layers_pattern", default=None),
)

BOOKKEEPING = (
    Field("base_model_name_or_path", "base_model_name_or_path", default=None),
    Field("task_type", "task_type", default=None),
)

LORA = (
    Field("lora_alpha", "lora_alpha"),
    Field("lora_dropout", "lora_dropout", default=0.0),
    *TARGETS,
    *BOOKKEEPING,
)

# Fields of PEFT's LoraConfig (0.3 to 0.21) that do not change what a saved adapter computes.
INERT = frozenset(
    {
        # how A and B began; `CHECKED` refuses what also moved the base
        "init_lora_weights",
        "init_weights",
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        # whether the base stores W as [in, out], as GPT-2's Conv1D does; A and B never are
        "fan_in_fan_out",
        # read only beside use_qalora and megatron_config, which are refused
        "qalora_group_size",
        "megatron_core",
        # when W + s B A is added up, and on which device
        "merge_weights",
        "runtime_config",
        # who wrote it
        "peft_version",
    }
)

# Why a field that is not inert makes more of an adapter than s B A x.
REFUSED = {
    "alora_invocation_tokens": "aLoRA, which acts only from these tokens on",
    "arrow_config": "Arrow, which mixes several adapters: read the directory that holds its task folders",
    "enable_lora": "MergedLinear, which adapts only parts of a fused layer",
    "ensure_weight_tying": "one adapter for layers whose weights are tied",
    "kasa_config": "KaSA, which changes the base and puts a diagonal between B and A",
    "layer_replication": "a base whose layers are repeated",
    "megatron_config": "Megatron's parallel layers, of which a file may hold one process's part",
    "modules_to_save": "trained copies of whole modules",
    "monteclora_config": "MonteCLoRA, whose samplers are part of the adapter",
    "target_parameters": "LoRA on parameters that are not a linear layer's weight",
    "trainable_token_indices": "trained rows of an embedding",
    "use_bdlora": "BD-LoRA, whose A or B is block-diagonal",
    "use_dora": "DoRA, which rescales W + s B A by trained magnitudes",
    "use_qalora": "QA-LoRA, which averages groups of inputs before A",
    "velora_config": "VeLoRA, whose projections are part of the adapter",
}

_KEPT_BASE = (
    "save the base that PEFT changed, model.unload().save_pretrained(BASE), and set init_lora_weights to true: on BASE "
    "the adapter is an ordinary LoRA"
)
_CONVERTED = (
    "PEFT makes an ordinary LoRA of it: model.save_pretrained(DIR, path_initial_model_for_weight_conversion=INIT), "
    "where INIT is the adapter as saved before training"
)


def init_problem(value: Any) -> str:
    """Why an adapter that PEFT initialised in this way is no LoRA on the base as it was published; "" if it is one."""
    name = value.lower() if isinstance(value, str) else value
    if name is None or isinstance(name, bool) or name in ("gaussian", "eva", "orthogonal", "mica"):
        return ""
    if isinstance(name, str) and (name.startswith(("pissa", "corda")) or name in ("olora", "lora_ga")):
        return f"this moved a part of the base into A and B. {_CONVERTED}. Or {_KEPT_BASE}"
    if name == "loftq":
        return f"this quantised the base, and A and B make up for it. {_KEPT_BASE[0].upper()}{_KEPT_BASE[1:]}"
    return "expected true, false, gaussian, eva, orthogonal or mica: another one may have changed the base"


def activation_problem(value: Any) -> str:
    """MixLoRA's experts use `act_fn` instead of the base's own activation, and this is SiLU in nearly all of them."""
    if value in (None, "silu"):
        return ""
    return "its experts use this instead of the base's activation; if the base has the same one, set act_fn to null"


def sparsegen_problem(value: Any) -> str:
    """LD-MoLE says only here whether its gates are sparsegen's; its field `sparsegen` is always false."""
    if isinstance(value, Mapping) and value.get("enabled") is False:
        return ""
    return "expected enabled false: with sparsegen the gates are no softmax, and the layout is ld-mole"


def named_modules_problem(value: Any) -> str:
    """LD-MoLE names a classifier and its sparsegen where there is neither; tensors of them are refused anyway."""
    if value in (None, []) or (isinstance(value, list) and all(name in ("score", "sparsegen") for name in value)):
        return ""
    return f"which means {REFUSED['modules_to_save']}, and the file has none"


def whole_batch_problem(value: Any) -> str:
    """X-LoRA's own second softmax; PEFT's is one of each token's scores."""
    if not value:
        return ""
    return "which is one softmax over every kept score of a batch: a token's gates depend on all other tokens"


# Why a value of an ignored field may not be ignored; "" if it may.
CHECKED: Mapping[str, Callable[[Any], str]] = {
    "init_lora_weights": init_problem,
    "init_weights": init_problem,
    "act_fn": activation_problem,
    "modules_to_save": named_modules_problem,
    "sparsegen_cfg": sparsegen_problem,
    "enable_softmax_topk": whole_batch_problem,
}
