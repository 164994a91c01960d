"""Attention as its formula says it: the reference for the other forms."""

import jax
import jax.numpy as jnp

from moe_lora_jax.models.masks import Visibility


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, sight: Visibility, *, scale: float, softcap: float | None
) -> jax.Array:
    """`softmax(scale * q k^T) v`, the softmax in float32.

    With a softcap c, scores s become `c * tanh(s / c)` before the mask. A query with no visible key (padding) gets an
    unused finite value, and finite gradients.

    Args:
        query: [batch, heads, queries, head_dim].
        key, value: [batch, kv_heads, keys, head_dim]; each serves heads / kv_heads consecutive query heads.
        sight: which keys each query may see.

    Returns:
        [batch, heads, queries, head_dim] in the dtype of `value`.
    """
    batch, heads, queries, head_dim = query.shape
    groups = key.shape[1]
    grouped = query.reshape(batch, groups, heads // groups, queries, head_dim)
    scores = jnp.einsum("bgrqd,bgkd->bgrqk", grouped, key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(sight.mask()[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bgrqk,bgkd->bgrqd", weights, value).reshape(query.shape)
