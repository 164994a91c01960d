"""Changing a model of shapes as one of arrays is changed."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.sharding import NamedSharding

from moe_lora_jax.sharding import place_adapter, put


def change_abstractly(model: Any, rngs: nnx.Rngs, change: Callable[[Any, nnx.Rngs], Any]) -> Any:
    """`change(model, rngs)`, in place, on a model that has shapes in place of arrays.

    Nothing is computed. Variables of the base layers stay where they are on a mesh, although the wrapped layers have
    longer paths; what is new is placed as an adapter.
    """
    where = {path: variable.get_value().sharding for path, variable in nnx.to_flat_state(nnx.state(model))}
    graphdef, state = nnx.split(nnx.eval_shape(change, model, rngs))

    def placed(path: tuple[Any, ...], variable: Any) -> Any:
        before = where.get(tuple(part for part in path if part != "base_layer"))
        return variable.replace(put(variable.get_value(), before)) if isinstance(before, NamedSharding) else variable

    flat = [(path, placed(path, variable)) for path, variable in nnx.to_flat_state(state)]
    made = nnx.merge(graphdef, nnx.from_flat_state(flat))
    place_adapter(made)
    for name, value in vars(made).items():
        if not name.startswith("_"):
            setattr(model, name, value)
    return model
