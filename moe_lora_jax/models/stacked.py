"""A decoder's state with all layers of one variable in one array: what a scanned program takes and returns.

    model.layers.0.mlp.up_proj.kernel [in, out], model.layers.1..., ...
    model.stacked_layers.mlp.up_proj.kernel [layer, in, out]

A model keeps a list of layers. A scan over it joins their variables; XLA takes the join of an unstacked array for the
array itself. So a program whose arguments are stacked holds no second copy, and its size does not grow with the layers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

LAYERS, STACKED = ("model", "layers"), ("model", "stacked_layers")


def is_scanned(model: nnx.Module) -> bool:
    """Whether the model's layers run as one scan."""
    return bool(getattr(getattr(model, LAYERS[0], None), "scan_layers", False))


def stack_layers(tree: Any) -> Any:
    """The same pytree, with the layers of every `nnx.State` in it stacked.

    Only variables that all layers have, in one shape and dtype, are stacked. The inverse is `unstack_layers`.
    """
    return _on_states(_stacked, tree)


def unstack_layers(tree: Any) -> Any:
    """The inverse of `stack_layers`; a tree without stacked layers stays as it is."""
    return _on_states(_unstacked, tree)


def _on_states(function: Callable[[nnx.State], nnx.State], tree: Any) -> Any:
    def is_state(x: Any) -> bool:
        return isinstance(x, nnx.State)

    return jax.tree.map(lambda x: function(x) if is_state(x) else x, tree, is_leaf=is_state)


def _stacked(state: nnx.State) -> nnx.State:
    others: list[tuple[tuple[Any, ...], Any]] = []
    layers: dict[tuple[Any, ...], dict[Any, Any]] = {}
    for path, variable in nnx.to_flat_state(state):
        if path[: len(LAYERS)] == LAYERS:
            layers.setdefault(path[len(LAYERS) + 1 :], {})[path[len(LAYERS)]] = variable
        else:
            others.append((path, variable))
    number = max((index for by_layer in layers.values() for index in by_layer), default=-1) + 1
    for rest, by_layer in layers.items():
        variables = [by_layer[index] for index in sorted(by_layer)]
        if len(variables) == number and len({(v.shape, v.dtype) for v in variables}) == 1:
            others.append(((*STACKED, *rest), variables[0].replace(_joined([v.get_value() for v in variables]))))
        else:
            others.extend(((*LAYERS, index, *rest), variable) for index, variable in by_layer.items())
    return nnx.from_flat_state(others)


def _unstacked(state: nnx.State) -> nnx.State:
    found: list[tuple[tuple[Any, ...], Any]] = []
    for path, variable in nnx.to_flat_state(state):
        if path[: len(STACKED)] == STACKED:
            for index, value in enumerate(_rows(variable[...], variable.shape[0])):
                found.append(((*LAYERS, index, *path[len(STACKED) :]), variable.replace(value)))
        else:
            found.append((path, variable))
    return nnx.from_flat_state(found)


def _joined(arrays: Sequence[Any]) -> Any:
    """The arrays along a new first axis; of shapes, the shape of that, every part where it was."""
    first = arrays[0]
    if not isinstance(first, jax.ShapeDtypeStruct):
        return jnp.stack(arrays)
    where = first.sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec(None, *where.spec))
    return jax.ShapeDtypeStruct((len(arrays), *first.shape), first.dtype, sharding=where)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rows(array: jax.Array, number: int) -> tuple[jax.Array, ...]:
    """array[0], array[1], ...; its derivative stacks, where that of indexing would add up padded arrays."""
    return tuple(array[index] for index in range(number))


def _rows_forward(array: jax.Array, number: int) -> tuple[tuple[jax.Array, ...], None]:
    return _rows(array, number), None


def _rows_backward(number: int, _: None, cotangents: Sequence[jax.Array]) -> tuple[jax.Array]:
    return (jnp.stack(cotangents),)


_rows.defvjp(_rows_forward, _rows_backward)
