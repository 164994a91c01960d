"""A temperature that a small network gives to every token (LD-MoLE)."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_jax.layers.mixing import MoeLoraParam

STD = 0.02


class Temperature(nnx.Module):
    """T = least + softplus(-(W_1 relu(W_0 x + b_0) + b_1)), which is never below `least`. Always in fp32.

    Variables: `kernel_0` [in, width] and `kernel_1` [width, 1], N(0, 0.02^2) at init; `bias_0` and `bias_1`, zero.
    """

    def __init__(self, in_features: int, width: int, least: float, *, rngs: nnx.Rngs):
        self.least = least
        self.kernel_0 = MoeLoraParam(STD * jax.random.normal(rngs.params(), (in_features, width), jnp.float32))
        self.bias_0 = MoeLoraParam(jnp.zeros(width, jnp.float32))
        self.kernel_1 = MoeLoraParam(STD * jax.random.normal(rngs.params(), (width, 1), jnp.float32))
        self.bias_1 = MoeLoraParam(jnp.zeros(1, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [tokens, in] -> [tokens, 1]."""
        hidden = jax.nn.relu(_affine(x.astype(jnp.float32), self.kernel_0, self.bias_0))
        return self.least + jax.nn.softplus(-_affine(hidden, self.kernel_1, self.bias_1))


def _affine(x: jax.Array, kernel: MoeLoraParam, bias: MoeLoraParam) -> jax.Array:
    product = jnp.matmul(x, kernel[...].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return product + bias[...].astype(jnp.float32)
