"""Task tables: a row per task, read by task id."""

import jax
import jax.numpy as jnp


def task_rows(table: jax.Array, task_ids: jax.Array) -> jax.Array:
    """Rows of `table` [task, dim] for task ids [batch], or the mean over ids > 0 for [batch, n]: [batch, dim].

    Ids outside 0..task-1 give NaN, as nothing can raise inside jit; in [batch, n] id 0 means "none" (MOELoRA's rule).

    Raises:
        ValueError: the ids are no integers of shape [batch] or [batch, n].
    """
    ids = jnp.asarray(task_ids)
    if ids.ndim not in (1, 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"task_ids must be integers [batch] or [batch, n], got {ids.dtype} {list(ids.shape)}")
    ids = jnp.where(ids < 0, table.shape[0], ids)  # negative indices would count from the end
    rows = jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)
    if ids.ndim == 1:
        return rows
    given = (ids > 0)[..., None]
    total = jnp.sum(jnp.where(given, rows, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(given, axis=1), 1)
