"""How gates travel from a router to the layers that it serves, when it does not stand at the layer itself."""

import jax
import jax.numpy as jnp
from flax import nnx


class Shared(nnx.Variable):
    """One value shared by a router and its layers: set before their call, emptied after it.

    Holds gates [rows, layer, split, expert], or task ids [rows, n]; a row is a token, or a whole sequence. A Variable
    and not a Python holder, so that it is seen right under nnx.remat and nnx.scan.
    """

    @classmethod
    def empty(cls) -> "Shared":
        return cls(jnp.zeros((0,)))

    @property
    def is_empty(self) -> bool:
        """Whether no router has set a value."""
        return self.get_value().size == 0

    def clear(self) -> None:
        """Back to nothing, so that a later call cannot see this one's value."""
        self.set_value(jnp.zeros((0,)))


def per_token(rows: jax.Array, tokens: int) -> jax.Array:
    """[rows, ...] -> [tokens, ...]: each sequence's value for each of its tokens."""
    return rows if rows.shape[0] == tokens else jnp.repeat(rows, tokens // rows.shape[0], axis=0)
