"""Putting an adapter on and off a model, loading and saving it, several at once, and summing it up."""

from moe_lora_jax.adapters.adapter_bank import AdapterBank, select_adapters
from moe_lora_jax.adapters.apply import apply_moe_lora, remove_moe_lora
from moe_lora_jax.adapters.checkpoint import combine, load_adapter, save_pretrained, to_adapter
from moe_lora_jax.adapters.filters import experts_only, router_only
from moe_lora_jax.adapters.model_spec import ModelSpec
from moe_lora_jax.adapters.parameter_summary import summary

__all__ = [
    "AdapterBank",
    "ModelSpec",
    "apply_moe_lora",
    "combine",
    "experts_only",
    "load_adapter",
    "remove_moe_lora",
    "router_only",
    "save_pretrained",
    "select_adapters",
    "summary",
    "to_adapter",
]
