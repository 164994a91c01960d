"""Fields that many layouts share: most are forks of PEFT's LoRA."""

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

# Fields of PEFT's LoraConfig (0.3 to 0.21) with no bearing on a loaded adapter, or only on how it was initialised.
INERT = frozenset(
    {
        "eva_config",
        "corda_config",
        "enable_lora",
        "init_lora_weights",
        "init_weights",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
    }
)
