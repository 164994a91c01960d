"""Native format, versions 1 and 2: what PEFT's own save_pretrained writes for the MOE_LORA tuner. See FORMAT.md."""

from moe_lora_interop.config.adapter_config import PEFT_TYPE
from moe_lora_interop.rules.base_tensors import BASE_TENSORS
from moe_lora_interop.rules.dialect import Dialect
from moe_lora_interop.rules.tensors import Rule

NATIVE = Dialect(
    name="native",
    source="moe-lora-jax, format versions 1 and 2",
    rules=(
        Rule("lora_A", "base_model.model.{module}.moe_lora_A", "expert rank in"),
        Rule("lora_B", "base_model.model.{module}.moe_lora_B", "expert out rank"),
        Rule("router", "base_model.model.{module}.moe_lora_router.weight", "logit in"),
        Rule("router_bias", "base_model.model.{module}.moe_lora_router.bias", "logit"),
        Rule("threshold", "base_model.model.{module}.moe_lora_threshold.weight", "one in"),
        Rule("threshold_bias", "base_model.model.{module}.moe_lora_threshold.bias", "one"),
        Rule("temperature_{j}", "base_model.model.{module}.moe_lora_temperature_{j}.weight", "unit in"),
        Rule("temperature_bias_{j}", "base_model.model.{module}.moe_lora_temperature_{j}.bias", "unit"),
        Rule("task_embedding", "base_model.model.{module}.moe_lora_task_embedding.weight", "task dim"),
        Rule("router_{j}", "base_model.moe_lora_router_{j}.weight", "unit in", module=""),
        Rule("router_bias_{j}", "base_model.moe_lora_router_{j}.bias", "unit", module=""),
        Rule("task_embedding", "base_model.moe_lora_task_embedding.weight", "task dim", module=""),
        *BASE_TENSORS,
    ),
    needs=frozenset({"lora_A", "lora_B"}),
    own_config=True,
    const={"peft_type": (PEFT_TYPE,)},
    metadata={"format": "pt", "format_version": "{format_version}"},
    signed=True,
    card=True,
)
