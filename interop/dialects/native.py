"""Native format version 1: what PEFT's own save_pretrained writes for the MOE_LORA tuner. See interop/FORMAT.md."""

from interop.rules import Dialect, Rule

NATIVE = Dialect(
    name="native",
    source="moe-lora-jax, format version 1",
    rules=(
        Rule("lora_A", "base_model.model.{module}.moe_lora_A", "expert rank in"),
        Rule("lora_B", "base_model.model.{module}.moe_lora_B", "expert out rank"),
        Rule("router", "base_model.model.{module}.moe_lora_router.weight", "expert in"),
        Rule("router_bias", "base_model.model.{module}.moe_lora_router.bias", "expert"),
        Rule("threshold", "base_model.model.{module}.moe_lora_threshold.weight", "unit in"),
        Rule("threshold_bias", "base_model.model.{module}.moe_lora_threshold.bias", "unit"),
    ),
)
