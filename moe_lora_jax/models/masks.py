"""Which keys each query may see."""

import jax
import jax.numpy as jnp


def real_positions(real: jax.Array) -> jax.Array:
    """Position of each token counted from the first real one of its row: bool [batch, seq] -> int32 [batch, seq].

    Right for left padding, right padding and none; padding tokens get an unused position.
    """
    return jnp.maximum(jnp.cumsum(real, axis=-1, dtype=jnp.int32) - 1, 0)


def segment_positions(segments: jax.Array) -> jax.Array:
    """Position of each token counted from the first of its segment: int [batch, seq] -> int32 [batch, seq].

    A segment is a run of equal numbers.
    """
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    begins = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    return slots - jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)


def visible(
    query_slots: jax.Array,
    key_slots: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    real: jax.Array | None,
    window: int | None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Causal visibility, as bool [batch or 1, 1, queries, keys].

    A query sees the real keys written no later than itself and, with a window, fewer than `window` positions back.
    Order is that of the slots (columns of the batch, or of the cache). Distance is that of the positions, because a
    right-padded prompt leaves a gap of unused slots before the tokens generated after it.

    Args:
        query_slots: int32 [queries].
        key_slots: int32 [keys].
        query_positions: int32 [batch or 1, queries].
        key_positions: int32 [batch or 1, keys].
        real: bool [batch, keys], False for padding; None if there is none.
        window: how many tokens back a query sees, itself included; None for all.
        segments: integers [batch, keys], where the keys are the queries: a token sees its own segment alone.
    """
    mask = (key_slots <= query_slots[:, None])[None]
    if real is not None:
        mask = mask & real[:, None, :]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    if window is not None:
        mask = mask & (query_positions[:, :, None] - key_positions[:, None, :] < window)
    return mask[:, None]
