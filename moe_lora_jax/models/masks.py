"""Which keys each query may see."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_ALL = np.iinfo(np.int32).max  # a window that leaves nothing out


def real_positions(real: jax.Array) -> jax.Array:
    """Position of each token counted from the first real one of its row: bool [batch, seq] -> int32 [batch, seq].

    Right for left padding, right padding and none; padding tokens get an unused position.
    """
    return jnp.maximum(jnp.cumsum(real, axis=-1, dtype=jnp.int32) - 1, 0)


def segment_runs(segment_ids: jax.Array) -> jax.Array:
    """Every run of equal numbers as a segment of its own, also where a number comes again: 4 4 2 4 0 -> 1 1 2 3 0.

    Integers [batch, seq] -> int32 [batch, seq]; 0 stays 0, padding.
    """
    return jnp.where(segment_ids == 0, 0, jnp.cumsum(_begins(segment_ids), axis=1, dtype=jnp.int32))


def segment_positions(segments: jax.Array) -> jax.Array:
    """Position of each token counted from the first of its segment: int [batch, seq] -> int32 [batch, seq]."""
    slots = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    return slots - jax.lax.cummax(jnp.where(_begins(segments), slots, 0), axis=1)


def _begins(segments: jax.Array) -> jax.Array:
    return jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0


class Tokens(NamedTuple):
    """What decides who sees whom.

    slots: int32 [tokens], their columns in the batch or in the cache.
    positions: int32 [batch or 1, tokens].
    segments: integers [batch, tokens]; None if a row is one sequence.
    """

    slots: jax.Array
    positions: jax.Array
    segments: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visibility:
    """Causal visibility, in arrays that grow with the sequence and not with its square.

    A query sees the real keys of its segment that were written no later than itself and, with a window, fewer than
    `window` positions back. Order is that of the slots. Distance is that of the positions, because a right-padded
    prompt leaves a gap of unused slots before the tokens generated after it.

    Attributes:
        queries, keys: the tokens; the same object where each is both.
        real: bool [batch, keys], False for padding; None if there is none.
        windows: how many tokens back a query sees, itself included, None for all; one for each kind of layer.
        which: int32 scalar, the layer's own of these windows; None if there is one only.
    """

    queries: Tokens
    keys: Tokens
    real: jax.Array | None
    which: jax.Array | None
    windows: tuple[int | None, ...] = field(metadata={"static": True})

    def mask(self) -> jax.Array:
        """bool [batch or 1, 1, queries, keys], True where visible."""
        queries, keys = self.queries, self.keys
        window: jax.Array | int | None = self.windows[0]
        mask = (keys.slots <= queries.slots[:, None])[None]
        if self.real is not None:
            mask = mask & self.real[:, None, :]
        if queries.segments is not None and keys.segments is not None:
            mask = mask & (queries.segments[:, :, None] == keys.segments[:, None, :])
        if self.which is not None:
            window = jnp.asarray([_ALL if w is None else w for w in self.windows], jnp.int32)[self.which]
        if window is not None:
            mask = mask & (queries.positions[:, :, None] - keys.positions[:, None, :] < window)
        return mask[:, None]
