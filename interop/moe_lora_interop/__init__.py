"""Mixture-of-LoRA checkpoints, framework-free: read, write, convert, inspect, verify. Imports neither jax nor torch."""

from moe_lora_interop.checkpoint import Adapter, Finding, Inspection, convert, detect, inspect, read, verify, write
from moe_lora_interop.config import MoeLoraConfig
from moe_lora_interop.config.routings import register_routing
from moe_lora_interop.dialects.registry import register_dialect
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_interop.export.combining import combine
from moe_lora_interop.rules import Dialect, Field, Rule

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = [
    "Adapter",
    "CheckpointError",
    "ConfigError",
    "Dialect",
    "Field",
    "Finding",
    "Inspection",
    "MoeLoraConfig",
    "Rule",
    "combine",
    "convert",
    "detect",
    "inspect",
    "read",
    "register_dialect",
    "register_routing",
    "verify",
    "write",
]
