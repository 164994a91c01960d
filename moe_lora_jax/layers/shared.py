"""How gates and task ids travel to the layers that they serve, and what a task id means in a table."""

import jax
import jax.numpy as jnp
from flax import nnx


class Shared(nnx.Variable):
    """One value shared by a router and its layers: set before their call, emptied after it.

    Holds gates [rows, layer, split, expert], or task ids [rows, n]; a row is a token, or a whole sequence. In a
    feed-forward block it holds a run (see `slots`), and what a layer keeps from one run for the next. A Variable
    and not a Python holder, so that it is seen right under nnx.remat and nnx.scan.
    """

    @classmethod
    def empty(cls) -> "Shared":
        return cls(jnp.zeros((0,)))

    @property
    def is_empty(self) -> bool:
        """Whether no router has set a value."""
        value = self.get_value()
        return isinstance(value, jax.Array) and value.size == 0

    def clear(self) -> None:
        """Back to nothing, so that a later call cannot see this one's value."""
        self.set_value(jnp.zeros((0,)))


def per_token(rows: jax.Array, tokens: int) -> jax.Array:
    """[rows, ...] -> [tokens, ...]: each sequence's value for each of its tokens."""
    return rows if rows.shape[0] == tokens else jnp.repeat(rows, tokens // rows.shape[0], axis=0)


def task_rows(table: jax.Array, task_ids: jax.Array) -> jax.Array:
    """Rows of `table` [task, dim] for task ids [batch], or the mean over ids > 0 for [batch, n]: [batch, dim].

    Ids outside 0..task-1 give NaN, as nothing can raise inside jit; in [batch, n] id 0 means "none" (MOELoRA's rule).

    Raises:
        ValueError: the ids are no integers of shape [batch] or [batch, n].
    """
    ids = jnp.asarray(task_ids)
    if ids.ndim not in (1, 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"task_ids: found {ids.dtype} {list(ids.shape)}, expected integers [batch] or [batch, n]")
    ids = jnp.where(ids < 0, table.shape[0], ids)  # negative indices would count from the end
    rows = jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)
    if ids.ndim == 1:
        return rows
    given = (ids > 0)[..., None]
    total = jnp.sum(jnp.where(given, rows, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(given, axis=1), 1)
