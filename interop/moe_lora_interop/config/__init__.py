"""The words of an adapter's config, and which of them may stand together. The formulas: `adapter_config`."""

from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig
from moe_lora_interop.config.presets import PRESETS

__all__ = ["ModuleConfig", "MoeLoraConfig", "PRESETS"]
