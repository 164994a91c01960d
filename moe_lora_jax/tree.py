"""Walking a model's modules by path, and replacing them."""

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from moe_lora_interop.errors import ConfigError
from moe_lora_jax.layers.mixing import MoeLoraParam


def has_adapter(model: nnx.Module) -> bool:
    """Whether the model carries an adapter."""
    return bool(jax.tree.leaves(nnx.state(model, MoeLoraParam)))  # type: ignore[call-overload]


def modules(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """(path joined with dots, module).

    Raises:
        ConfigError: a name on a path contains a dot, so that the joined path would mean another module.
    """
    for path, module in nnx.iter_modules(model):
        if dotted := [part for part in path if isinstance(part, str) and "." in part]:
            raise ConfigError(
                "the model cannot be addressed", [f"{'.'.join(map(str, path))}: the name {dotted[0]!r} contains a dot"]
            )
        yield ".".join(map(str, path)), module


def _find(model: nnx.Module, path: str) -> Any:
    owner: Any = model
    for part in path.split(".") if path else []:
        owner = owner[int(part)] if isinstance(owner, nnx.List) else getattr(owner, part)
    return owner


def replace_module(model: nnx.Module, path: str, new: nnx.Module) -> None:
    """Puts `new` at a path, in place."""
    parent, _, name = path.rpartition(".")
    owner = _find(model, parent)
    if isinstance(owner, nnx.List):
        owner[int(name)] = new
    else:
        setattr(owner, name, new)
