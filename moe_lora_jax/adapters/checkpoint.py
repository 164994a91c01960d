"""Between an NNX model and an `moe_lora_interop.Adapter`: the parameter tree is one more layout."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

import moe_lora_interop
from moe_lora_interop.checkpoint.adapter import Adapter, config_sizes
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.export.combining import combine as combine_adapters
from moe_lora_interop.rules.tensors import decode, encode
from moe_lora_jax.adapters.apply import LinearLayer, adapted_names, apply_to_modules, linear_layers
from moe_lora_jax.adapters.jax_tree import JAX_TREE
from moe_lora_jax.adapters.model_spec import ModelSpec
from moe_lora_jax.layers.mixing import MoeLoraParam
from moe_lora_jax.processes import once, whole
from moe_lora_jax.sharding import put_like
from moe_lora_jax.tree import has_adapter


def to_adapter(model: Any) -> Adapter:
    """The adapter that `model` carries, as numpy arrays in canonical axes.

    Raises:
        CheckpointError: the model carries none, or several.
    """
    if not has_adapter(model):
        raise CheckpointError("the model has no adapter: call apply_moe_lora or load_adapter first")
    if not hasattr(model, "moe_lora_config"):
        raise CheckpointError(
            "the model has an AdapterBank: save its adapters by name, with the bank's save_pretrained"
        )
    stored = {path: whole(leaf) for path, leaf in _leaves(model).items()}
    config = model.moe_lora_config
    tensors, problems = decode(JAX_TREE.rules, stored, config_sizes(config))
    if problems:
        raise CheckpointError("the model's adapter variables do not form an adapter", problems)
    return Adapter(config, tensors)


def save_pretrained(model: nnx.Module, directory: str | os.PathLike[str]) -> None:
    """Writes the model's adapter to `directory` in the native layout, which PEFT reads.

    With several processes all of them must call this; the first one writes.

    Raises:
        CheckpointError: the model has no adapter, or the directory cannot be written.
    """
    adapter = to_adapter(model)
    once(lambda: moe_lora_interop.write(adapter, directory))


def load_adapter(
    model: nnx.Module,
    source: str | os.PathLike[str] | Adapter,
    *,
    dialect: str | None = None,
    rngs: nnx.Rngs | None = None,
    spec: ModelSpec | None = None,
    **options: Any,
) -> nnx.Module:
    """Applies a stored adapter's config to a base model, in place, then its weights. Returns the model.

    Args:
        model: a base model without an adapter.
        source: a directory in any readable layout, or an `moe_lora_interop.Adapter`.
        dialect: the layout's name, as for `moe_lora_interop.read`.
        options: what the layout does not record, as for `moe_lora_interop.read`.
        rngs: stream "dropout", for training on; default `nnx.Rngs(0)`.
        spec: names and layer classes of a model that `load_base_model` did not make, as for `apply_moe_lora`.

    Raises:
        CheckpointError: unreadable, or for another base model: every module that is missing there or has other sizes is
            listed, and the model is left as it was.
    """
    if has_adapter(model):
        raise CheckpointError("the model already has an adapter: call remove_moe_lora(model) first")
    adapter = source if isinstance(source, Adapter) else moe_lora_interop.read(source, dialect, **options)
    config = adapter.config
    if config.modules_to_save:
        raise CheckpointError(
            "cannot be loaded in JAX", [f"modules_to_save: found {config.modules_to_save}, expected null: PyTorch only"]
        )
    spec = spec or ModelSpec()
    check_fits(linear_layers(model, spec), adapter)
    apply_to_modules(model, config, adapter.modules, rngs=rngs or nnx.Rngs(0), param_dtype=adapter.dtype, spec=spec)
    stored, problems = encode(JAX_TREE.rules, adapter.tensors, config_sizes(config))
    names = adapted_names(model)
    state = [(path, _name(path, names), v) for path, v in nnx.to_flat_state(nnx.state(model, MoeLoraParam))]
    assert not problems and stored.keys() == {name for _, name, _ in state}, "checked against the config before"
    filled = {
        path: variable.replace(put_like(np.asarray(stored[name]), variable[...])) for path, name, variable in state
    }
    nnx.update(model, nnx.from_flat_state(filled))
    return model


def _leaves(model: nnx.Module) -> dict[str, jax.Array]:
    names = adapted_names(model)
    return {_name(path, names): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, MoeLoraParam))}


def _name(path: tuple[Any, ...], names: Mapping[str, str]) -> str:
    """A variable's path as the layout `jax_tree` names it: without wrappers, and its module's path translated."""
    parts = [str(part) for part in path if part != "base_layer"]
    for end in range(len(parts), 0, -1):
        if (module := names.get(".".join(parts[:end]))) is not None:
            return ".".join([module, *parts[end:]])
    return ".".join(parts)


def check_fits(linears: Mapping[str, LinearLayer], adapter: Adapter) -> None:
    """Raises CheckpointError unless the base model has every module of the adapter, in its size."""
    problems = []
    for module, found in adapter.features.items():
        if module not in linears:
            problems.append(f"{module}: the base model has no linear layer of this name")
            continue
        expected = (linears[module].map.in_features, linears[module].map.out_features)
        if found != expected:
            problems.append(f"{module}: the adapter is for in, out = {found}, the base model has {expected}")
    if problems:
        raise CheckpointError("the adapter is for another base model", problems)


def combine(
    model: nnx.Module, directories: Sequence[str | os.PathLike[str]], *, rngs: nnx.Rngs | None = None, **options: Any
) -> nnx.Module:
    """Puts a mixture of the LoRA adapters in `directories` on a base model, in place, and returns the model.

    Args:
        model: a base model without an adapter.
        directories: ordinary PEFT LoRA directories, two or more; each is an expert.
        rngs: stream "dropout", for training on; default `nnx.Rngs(0)`.
        options: router, top_k, seed, ...: as for `moe_lora_interop.export.combining.combine`.

    Raises:
        CheckpointError, ConfigError: as there, and as `load_adapter` does.
    """
    return load_adapter(model, combine_adapters(directories, **options), rngs=rngs)
