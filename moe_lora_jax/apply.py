"""Finds the target layers of a model by their paths and swaps mixtures in; and out again."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from interop.config import ModuleConfig, MoeLoraConfig
from interop.errors import CheckpointError, ConfigError
from moe_lora_jax.layers import MoeLoraLinear


def apply_moe_lora(
    model: nnx.Module, config: MoeLoraConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32
) -> nnx.Module:
    """Wraps every targeted `nnx.Linear` of `model` in a `MoeLoraLinear`, in place, and returns the model.

    Args:
        model: any NNX model; a layer's path joined with dots is its module name.
        config: which layers, and what mixture. "all-linear" is every linear layer but lm_head.
        rngs: streams "params" and "dropout".
        param_dtype: storage dtype of A and B.

    The config with its targets resolved is kept as `model.moe_lora_config`; `save_pretrained` writes it.

    Raises:
        ConfigError: target_modules match nothing, or the patterns do not fit the matched modules.
        CheckpointError: the model already carries an adapter (`remove_moe_lora` takes it off).
    """
    if moe_lora_layers(model):
        raise CheckpointError("the model already has an adapter: call remove_moe_lora(model) first")
    linears = {path: layer for path, layer in _modules(model) if isinstance(layer, nnx.Linear)}
    chosen = config.targets.select(linears)
    sizes: dict[str, ModuleConfig] = {}
    problems: list[str] = []
    for path in chosen:
        try:
            sizes[path] = config.for_module(path)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError("the config does not fit the model", problems)
    for path in chosen:
        layer = linears[path]
        wrapper = MoeLoraLinear(
            layer, layer.in_features, layer.out_features, sizes[path], config=config, param_dtype=param_dtype, rngs=rngs
        )
        _replace(model, path, wrapper)
    model.moe_lora_config = config.resolved(chosen)  # type: ignore[attr-defined]
    return model


def remove_moe_lora(model: nnx.Module) -> nnx.Module:
    """Takes the adapter off again, in place: the base layers return unchanged. Returns the model."""
    for path, layer in moe_lora_layers(model).items():
        _replace(model, path, layer.base_layer)
    if hasattr(model, "moe_lora_config"):
        del model.moe_lora_config
    return model


def moe_lora_layers(model: nnx.Module) -> dict[str, MoeLoraLinear]:
    """{module path: layer} of every mixture in the model."""
    return {path: layer for path, layer in _modules(model) if isinstance(layer, MoeLoraLinear)}


def _modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    for path, module in nnx.iter_modules(model):
        yield ".".join(map(str, path)), module


def _replace(model: nnx.Module, path: str, new: nnx.Module) -> None:
    *parents, name = path.split(".")
    owner: Any = model
    for part in parents:
        owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
    if name.isdigit():
        owner[int(name)] = new
    else:
        setattr(owner, name, new)
