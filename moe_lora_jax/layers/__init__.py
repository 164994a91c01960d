"""What one adapted layer computes: its experts, its router, the gates between them, and how gates travel."""

from moe_lora_jax.layers.feed_forward import MoeLoraFeedForward
from moe_lora_jax.layers.gating import RouterOutput
from moe_lora_jax.layers.linear import MoeLoraLinear
from moe_lora_jax.layers.linear_maps import LinearMap
from moe_lora_jax.layers.mixing import MoeLoraParam
from moe_lora_jax.layers.model_router import ModelRouter
from moe_lora_jax.layers.router import Router, TaskRouter

__all__ = [
    "LinearMap",
    "ModelRouter",
    "MoeLoraFeedForward",
    "MoeLoraLinear",
    "MoeLoraParam",
    "Router",
    "RouterOutput",
    "TaskRouter",
]
