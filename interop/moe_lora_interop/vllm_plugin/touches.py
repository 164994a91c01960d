"""Every touch of vLLM's private names."""

from moe_lora_interop.errors import ConfigError


def register() -> None:
    """Not there yet."""
    raise ConfigError("the vLLM plugin is not finished", [])
