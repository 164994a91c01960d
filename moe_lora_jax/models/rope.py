"""Rotary position embeddings: which frequencies, and the rotation itself.

Source: transformers/modeling_rope_utils.py, models/{llama,phi3,cohere2,ministral3}/modeling_*.py@5.24.0.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """The frequencies of one kind of layer.

    Attributes:
        theta: base wavelength; frequency i of dim/2 is `theta ** (-2i / dim)` radians per token.
        share: of a head's components, those that are turned: the first dim = share * head_dim.
        rope_type: "default", "linear" (all frequencies divided by `factor`), "llama3" (only the low ones), "yarn" (the
            low ones, with a ramp over the components), "longrope" (each by its own factor) or "none" (no rotation).
        factor: divisor of the scaled frequencies.
        low_freq_factor, high_freq_factor: with "llama3", wavelengths longer than original/low are divided by
            `factor`, those shorter than original/high are kept, and those between are interpolated.
        beta_fast, beta_slow, truncate: with "yarn", components that turn more than `beta_fast` times in the original
            context are kept, those that turn less than `beta_slow` times are divided; `truncate` widens the range
            between them to whole components.
        short_factor, long_factor: with "longrope", the divisors of sequences up to the original context, and beyond.
        attention_factor: factor on cosine and sine, so that scores have its square.
        original_max_position_embeddings: context length of the pretraining, in tokens.
        query_beta: a query at position p is multiplied by `1 + query_beta * log(1 + floor(p / original))`.
    """

    theta: float
    share: float = 1.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0
    original_max_position_embeddings: int = 0
    query_beta: float = 0.0


NO_ROPE = RopeConfig(theta=1.0, rope_type="none")
"""All angles are 0."""


class Rotary(NamedTuple):
    """cos, sin: float32 [batch or 1, 1, seq, turned / 2]. query_scale: [batch or 1, 1, seq, 1]; None for 1."""

    cos: jax.Array
    sin: jax.Array
    query_scale: jax.Array | None


def inverse_frequencies(rope: RopeConfig, head_dim: int, *, beyond: bool = False) -> np.ndarray:
    """Radians per token for each pair of turned components: float32 [turned / 2].

    In float32 step by step, like transformers: at position 30,000 one unit in the last place is a visible angle.

    Args:
        beyond: with "longrope", for sequences longer than the original context.
    """
    dim = int(head_dim * rope.share)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wavelengths = np.float32(rope.theta) ** exponents  # by 2 pi
    frequencies = np.float32(1.0) / wavelengths
    if rope.rope_type == "none":
        return np.zeros_like(frequencies)
    if rope.rope_type == "default":
        return frequencies
    if rope.rope_type == "longrope":
        return np.float32(1.0) / (
            np.asarray(rope.long_factor if beyond else rope.short_factor, np.float32) * wavelengths
        )
    if rope.rope_type == "yarn":
        kept = _kept_by_yarn(rope, dim)
        return (np.float32(1.0) / (np.float32(rope.factor) * wavelengths)) * (1 - kept) + frequencies * kept
    scaled = frequencies / np.float32(rope.factor)
    return scaled if rope.rope_type == "linear" else _llama3(rope, frequencies, scaled)


def _llama3(rope: RopeConfig, frequencies: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    context = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(context) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = (1 - smooth) * scaled + smooth * frequencies
    kept_or_scaled = np.where(wavelengths > context / low, scaled, frequencies)
    is_between = (wavelengths >= context / high) & (wavelengths <= context / low)
    return np.where(is_between, between, kept_or_scaled).astype(np.float32)


def _kept_by_yarn(rope: RopeConfig, dim: int) -> np.ndarray:
    """The share of each frequency that is kept: 1 for the fast ones, 0 for the slow ones (arXiv:2309.00071)."""

    def component(turns: float) -> float:
        """The one that turns so often in the original context."""
        return (
            dim * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    first, last = component(rope.beta_fast), component(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first)
    return 1 - np.clip(ramp, 0, 1)


def rotary_tables(rope: RopeConfig, positions: jax.Array, head_dim: int, segments: jax.Array | None = None) -> Rotary:
    """The rotation of tokens at these positions, int32 [batch or 1, seq].

    With "longrope", a batch whose largest position is beyond the original context has other frequencies, in all its
    tokens, as in transformers. With `segments` [batch, seq], ascending from 0, each segment has its own.
    """
    frequencies = jnp.asarray(inverse_frequencies(rope, head_dim))
    if rope.rope_type == "longrope":
        last = jnp.max(positions) if segments is None else _last_of_segment(positions, segments)[..., None]
        is_beyond = last >= rope.original_max_position_embeddings
        frequencies = jnp.where(is_beyond, inverse_frequencies(rope, head_dim, beyond=True), frequencies)
    angles = (positions[..., None].astype(jnp.float32) * frequencies)[:, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.attention_factor != 1:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    if not rope.query_beta:
        return Rotary(cos, sin, None)
    contexts = jnp.floor(positions / rope.original_max_position_embeddings)[:, None, :, None]
    return Rotary(cos, sin, 1 + rope.query_beta * jnp.log(1 + contexts))


def _last_of_segment(positions: jax.Array, segments: jax.Array) -> jax.Array:
    """Of each token, the largest position in its segment: [batch, seq]."""
    count = segments.shape[1] + 1
    largest = jax.vmap(lambda p, s: jax.ops.segment_max(p, s, count)[s])
    return largest(jnp.broadcast_to(positions, segments.shape), segments)


def rotate(x: jax.Array, rotary: Rotary, *, pairs: bool) -> jax.Array:
    """`[a, b] -> [a cos - b sin, b cos + a sin]`, in float32, for the first components of the last axis.

    a and b are the halves of what is turned, or with `pairs` its even and odd components.

    `x`: [batch, heads, seq, head_dim] -> the same shape and dtype.
    """
    cos, sin = rotary.cos, rotary.sin
    turned = x[..., : 2 * cos.shape[-1]].astype(jnp.float32)
    a, b = (turned[..., ::2], turned[..., 1::2]) if pairs else jnp.split(turned, 2, axis=-1)
    both = [a * cos - b * sin, b * cos + a * sin]
    out = jnp.stack(both, axis=-1).reshape(turned.shape) if pairs else jnp.concatenate(both, axis=-1)
    out = out.astype(x.dtype)
    return out if out.shape == x.shape else jnp.concatenate([out, x[..., out.shape[-1] :]], axis=-1)
