"""One linear layer with several adapters, one of which is chosen for every row of the batch."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_jax.layers.linear import LayerWrapper, MoeLoraLinear
from moe_lora_jax.layers.linear_maps import LinearMap
from moe_lora_jax.layers.mixing import MoeLoraParam
from moe_lora_jax.layers.shared import Shared


class MultiAdapterLinear(LayerWrapper):
    """y = W0 x + delta_a(x), a the adapter of x's row; no delta for a = -1.

    Adapters of one config are one stack: their variables have a leading axis, and a row takes its own by index, so
    that the work does not grow with the number of adapters. Each further stack costs the work of one adapter.

    Args:
        base_layer: the frozen layer W0.
        linear_map: how it is a matrix.
        stacks: `MoeLoraLinear`s without base layer whose variables have a leading axis for the adapter.
        members: for each stack the numbers of its adapters, in the order of that axis.
        rows: the adapter of each row, integers [batch]; shared by all layers of a model.
    """

    def __init__(
        self,
        base_layer: nnx.Module,
        linear_map: LinearMap,
        stacks: list[MoeLoraLinear],
        members: list[tuple[int, ...]],
        rows: Shared,
    ):
        self.base_layer = base_layer
        self.linear_map = linear_map
        self.stacks = nnx.List(stacks)
        self.members = tuple(members)
        self.rows = rows

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """x [batch, ..., in], or [batch * seq, in] row by row -> [..., out]."""
        base = self.base_layer(x, *args, **kwargs)
        rows, flat = self.rows.get_value(), self.linear_map.flatten(x)
        batch = rows.shape[0]
        if batch == 0:
            raise ValueError("no adapters are selected: call AdapterBank.select with a name for every row")
        if flat.shape[0] % batch or (x.ndim > 2 and x.shape[0] != batch):
            raise ValueError(f"adapters are selected for {batch} rows, the input has shape {x.shape}")
        of_row = flat.reshape(batch, flat.shape[0] // batch, flat.shape[1])
        for stack, members in zip(self.stacks, self.members, strict=True):
            place = jnp.argmax(rows[:, None] == jnp.asarray(members), axis=1)
            is_here = jnp.isin(rows, jnp.asarray(members))
            delta = jnp.where(is_here[:, None, None], _delta_by_row(stack, place, of_row), 0)
            base = base + self.linear_map.restore(delta, base.shape).astype(base.dtype)
        return base


def _delta_by_row(stack: MoeLoraLinear, place: jax.Array, x: jax.Array) -> jax.Array:
    """[batch, seq, out]: row b of x [batch, seq, in] through the adapter at place[b] of the stack."""
    random = stack.rngs is not None or (stack.router is not None and stack.router.rngs is not None)
    if random and not stack.dropout.deterministic:
        raise ValueError("several adapters train without lora_dropout, expert_dropout and router_jitter_noise")
    parts: Any = nnx.split(stack, MoeLoraParam, ...)
    graphdef, adapters, rest = parts

    def delta(place: jax.Array, x: jax.Array) -> jax.Array:
        own = jax.tree.map(lambda stacked: stacked[place], adapters)
        return nnx.merge(graphdef, own, rest, copy=True).delta(x)

    return jax.vmap(delta)(place, x)
