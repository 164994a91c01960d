"""Token ids that the model has a row for. XLA does not ask: an id beyond the table gives NaN, or another id's row."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ADVICE = (
    "the tokenizer has tokens that the model has no row for: use the tokenizer that the model was trained with, or "
    "resize the model's embeddings and train those first"
)


def outside(ids: np.ndarray | Sequence[int], vocab_size: int) -> str | None:
    """What is wrong with the ids, any shape; None if all are in [0, vocab_size)."""
    found = np.asarray(ids)
    wrong = found[(found < 0) | (found >= vocab_size)]
    if not wrong.size:
        return None
    worst = int(wrong.max()) if wrong.max() >= vocab_size else int(wrong.min())
    return f"token id {worst}, the model's vocabulary has {vocab_size}: {ADVICE if worst >= 0 else 'ids start at 0'}"


def given_ids(ids: Any) -> Any:
    """The ids as an array with their values as given: JAX would cut 2**32 + 5 to 5, and 5.7 too.

    Raises:
        ValueError: no integers.
    """
    found = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if found.size and not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(f"input_ids: found {found.dtype}, expected integers of at most 64 bits")
    return found


def check_ids(model: Any, ids: Any, real: Any = None) -> None:
    """Looks at ids [batch, seq] of real tokens, if they are values already: those that are being traced have none yet.

    Args:
        model: its `config.vocab_size` says how many rows there are; one without is not checked.
        real: bool [batch, seq], False for padding, which may have any id; None if there is none.

    Raises:
        ValueError: an id that the model has no row for, with its row and column.
    """
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocab_size is None or any(isinstance(x, jax.core.Tracer) for x in (ids, real)):
        return
    if isinstance(ids, jax.Array) and not ids.is_fully_addressable:
        return  # spread over processes; each of them has looked at its own rows
    found = np.asarray(ids)
    wrong = (found < 0) | (found >= vocab_size)
    if real is not None:
        wrong &= np.asarray(real)
    if wrong.any():
        row, column = np.argwhere(wrong)[0].tolist()
        raise ValueError(f"input_ids[{row}, {column}]: {outside(found[row, column], vocab_size)}")
