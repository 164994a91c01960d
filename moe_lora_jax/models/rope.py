"""Rotary position embeddings: which frequencies, and the rotation itself.

Source: transformers/modeling_rope_utils.py and models/llama/modeling_llama.py@5.24.0.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The frequencies of one kind of layer.

    Attributes:
        theta: base wavelength; frequency i of head_dim/2 is `theta ** (-2i / head_dim)` radians per token.
        rope_type: "default", "linear" (all frequencies divided by `factor`) or "llama3" (only the low ones).
        factor: divisor of the scaled frequencies.
        low_freq_factor, high_freq_factor: with "llama3", wavelengths longer than original/low are divided by
            `factor`, those shorter than original/high are kept, and those between are interpolated.
        original_max_position_embeddings: context length of the pretraining, in tokens ("llama3" only).
    """

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per token for each pair of components: float32 [head_dim / 2].

    In float32 step by step, like transformers: at position 30,000 one unit in the last place is a visible angle.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.float32(rope.theta) ** exponents
    if rope.rope_type == "default":
        return frequencies
    scaled = frequencies / np.float32(rope.factor)
    if rope.rope_type == "linear":
        return scaled
    context = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(context) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = (1 - smooth) * scaled + smooth * frequencies
    kept_or_scaled = np.where(wavelengths > context / low, scaled, frequencies)
    is_between = (wavelengths >= context / high) & (wavelengths <= context / low)
    return np.where(is_between, between, kept_or_scaled).astype(np.float32)


def rotary_tables(rope: RopeConfig, positions: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles: positions [batch or 1, seq] -> two float32 [batch or 1, 1, seq, head_dim / 2]."""
    angles = positions[:, None, :, None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`[a, b] -> [a cos - b sin, b cos + a sin]` for the halves a, b of the last axis, in float32.

    `x`: [batch, heads, seq, head_dim] -> the same shape and dtype.
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
