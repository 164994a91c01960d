"""The key-value cache: fixed size, functional, one write slot shared by all rows."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from moe_lora_jax.models.config import DecoderConfig
from moe_lora_jax.models.masks import real_positions


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far.

    All rows write to the same slot; what differs by row (padding) is in `real` and `positions`, so left- and
    right-padded prompts need no moving of tensors.

    Attributes:
        keys, values: per layer, [batch, key_value_heads, capacity, head_dim]; keys are already rotated.
        positions: int32 [batch, capacity], the position of the token in each slot.
        real: bool [batch, capacity], False for padding and for slots not written yet.
        length: int32 scalar, the number of slots written.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array
    real: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, capacity: int) -> "KVCache":
        """A cache for `batch` rows of at most `capacity` tokens, padding included, in the dtype of the weights.

        Raises:
            ValueError: in longer sequences, the model rotates earlier tokens by other frequencies too.
        """
        switching = [r.original_max_position_embeddings for r in config.layer_ropes if r.rope_type == "longrope"]
        if switching and capacity > min(switching):
            raise ValueError(
                f"cache: found room for {capacity} tokens, expected at most original_max_position_embeddings "
                f"{min(switching)}: beyond it, longrope turns the keys in the cache by other frequencies"
            )
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        zeros = tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_hidden_layers))
        return cls(
            keys=zeros,
            values=zeros,
            positions=jnp.zeros((batch, capacity), jnp.int32),
            real=jnp.zeros((batch, capacity), bool),
            length=jnp.zeros((), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.real.shape[1]

    def next_positions(self, real: jax.Array) -> jax.Array:
        """Positions of new tokens after those seen: bool [batch, new] -> int32 [batch, new]."""
        return real_positions(real) + jnp.sum(self.real, axis=-1, dtype=jnp.int32, keepdims=True)

    def reserve(self, real: jax.Array, positions: jax.Array) -> "KVCache":
        """Book slots for new tokens ([batch, new] each); their keys and values are still to be written.

        Raises:
            ValueError: the tokens do not fit. Inside jit, only what the shapes alone show can be checked.
        """
        new = real.shape[1]
        try:
            used = int(self.length)
        except jax.errors.ConcretizationTypeError:
            used = 0
        if used + new > self.capacity:
            raise ValueError(
                f"cache: found {self.capacity - used} free slots of {self.capacity}, expected {new} for the new tokens"
            )
        at = (0, self.length)
        return replace(
            self,
            positions=jax.lax.dynamic_update_slice(self.positions, positions, at),
            real=jax.lax.dynamic_update_slice(self.real, real, at),
            length=self.length + new,
        )


def write(buffer: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """`buffer` [batch, heads, capacity, head_dim] with `new` [batch, heads, tokens, head_dim] from `slot` on."""
    return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), (0, 0, slot, 0))
