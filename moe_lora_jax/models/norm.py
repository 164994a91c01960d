"""Normalisation, in the variants of the supported families."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_jax.models.config import DecoderConfig


class Norm(nnx.Module):
    """`y = x / sqrt(mean(x**2) + eps) * w` over the last axis.

    The mean and the division are in float32 whatever the dtype of `x`; the result has the dtype of `x`. By
    `config.norm`:
        "rms": times `w` after casting back. In bfloat16 this rounds otherwise than
        "rms_wide": times `w` before casting back.
        "rms_plus_one": times `1 + w` before casting back (stored weights are centred on zero).
        "layer": "rms_wide" of `x - mean(x)`.

    Source: {Llama,Olmo2,Gemma2}RMSNorm and Cohere2LayerNorm in transformers/models/*/modeling_*.py@5.24.0.
    """

    def __init__(self, size: int, config: DecoderConfig):
        """`size`: length of the normalised axis. Weights start at the identity."""
        init = jnp.zeros if config.norm == "rms_plus_one" else jnp.ones
        self.weight = nnx.Param(init((size,), config.dtype))
        self.eps = config.norm_eps
        self.kind = config.norm

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x`: [..., size] -> [..., size], same dtype."""
        weight = self.weight[...]
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.kind == "rms":
            return (weight * normed.astype(x.dtype)).astype(x.dtype)
        weight = weight.astype(jnp.float32)
        return (normed * (1.0 + weight if self.kind == "rms_plus_one" else weight)).astype(x.dtype)
