"""Root-mean-square normalisation, in the two variants of the supported families."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_jax.models.config import DecoderConfig


class RMSNorm(nnx.Module):
    """`y = x / sqrt(mean(x**2) + eps) * w` over the last axis.

    The mean and the division are in float32 whatever the dtype of `x`; the result has the dtype of `x`.
    Llama, Mistral and Qwen multiply by `w` after casting back; Gemma multiplies by `1 + w` (stored weights are
    centred on zero) before casting back. In bfloat16 the two orders round differently, so both are kept.

    Source: LlamaRMSNorm and Gemma2RMSNorm in transformers/models/{llama,gemma2}/modeling_*.py@5.24.0.
    """

    def __init__(self, size: int, config: DecoderConfig):
        """`size`: length of the normalised axis. Weights start at the identity."""
        init = jnp.zeros if config.norm_plus_one else jnp.ones
        self.weight = nnx.Param(init((size,), config.dtype))
        self.eps = config.rms_norm_eps
        self.plus_one = config.norm_plus_one

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x`: [..., size] -> [..., size], same dtype."""
        weight = self.weight[...]
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.plus_one:
            return (normed * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
        return (weight * normed.astype(x.dtype)).astype(x.dtype)
