"""Attention over blocks of queries: its memory grows with the sequence, not with its square. On every device."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from moe_lora_jax.models.attending import plain
from moe_lora_jax.models.masks import Visibility

BLOCK = 128


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, sight: Visibility, *, scale: float, softcap: float | None
) -> jax.Array:
    """As `plain.attend`. Scores are there for one block at a time, in the backward pass too, which makes them anew."""
    batch, heads, length, head_dim = query.shape
    if length <= BLOCK:
        return plain.attend(query, key, value, sight, scale=scale, softcap=softcap)
    count = -(-length // BLOCK)

    def blocks(array: jax.Array, axis: int) -> jax.Array:
        """The axis filled up to whole blocks, and their number in front."""
        filled = jnp.pad(array, [(0, count * BLOCK - length if a == axis else 0) for a in range(array.ndim)])
        return jnp.moveaxis(filled.reshape(*array.shape[:axis], count, BLOCK, *array.shape[axis + 1 :]), axis, 0)

    def one(_: None, of_block: Any) -> tuple[None, jax.Array]:
        query, tokens = of_block
        return None, plain.attend(query, key, value, replace(sight, queries=tokens), scale=scale, softcap=softcap)

    tokens = jax.tree.map(lambda array: blocks(array, array.ndim - 1), sight.queries)
    _, mixed = jax.lax.scan(jax.checkpoint(one, prevent_cse=False), None, (blocks(query, 2), tokens))
    return jnp.moveaxis(mixed, 0, 2).reshape(batch, heads, -1, head_dim)[:, :, :length]
