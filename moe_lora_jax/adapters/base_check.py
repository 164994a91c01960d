"""Whether an adapter is for this base model: its layers, their sizes, and what PEFT saved of the base beside it."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.checkpoint.base_tensors import base_problems
from moe_lora_interop.disk.lazy import Tensor
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.rules.base_tensors import name_in_base
from moe_lora_jax.adapters.apply import LinearLayer
from moe_lora_jax.adapters.model_spec import ModelSpec, module_name
from moe_lora_jax.models.norm import Norm
from moe_lora_jax.processes import whole
from moe_lora_jax.tree import modules


def check_fits(model: nnx.Module, linears: Mapping[str, LinearLayer], adapter: Adapter, spec: ModelSpec) -> None:
    """Refuses an adapter for another base model.

    Raises:
        CheckpointError: modules that the base lacks or has in another size, and tensors of a base model in the
            adapter's file that are not this one's (bit by bit, in the narrower of the two dtypes).

    Warns:
        UserWarning: such tensors that cannot be compared, because the base is quantised or another program's.
    """
    problems = []
    for module, found in adapter.features.items():
        if module not in linears:
            hint = "; tied to the embeddings, it is no layer in JAX" if module == "lm_head" else ""
            problems.append(f"{module}: the base model has no linear layer of this name{hint}")
            continue
        expected = (linears[module].map.in_features, linears[module].map.out_features)
        if found != expected:
            problems.append(f"{module}: the adapter is for in, out = {found}, the base model has {expected}")
    problems += _of_base_problems(model, adapter.base_tensors, spec)
    if problems:
        raise CheckpointError("the adapter is for another base model", problems)


def _of_base_problems(model: nnx.Module, found: Mapping[str, Tensor], spec: ModelSpec) -> list[str]:
    names = tuple(spec.names.items())
    layers = {module_name(path, names) or path: layer for path, layer in modules(model)} if found else {}
    base: dict[str, np.ndarray] = {}
    narrow, unknown = {name: np.asarray(tensor) for name, tensor in found.items()}, []
    for name, tensor in found.items():
        value = _value(layers, name_in_base(name))
        if value is None:
            unknown.append(name)
        else:
            base[name] = value
            if value.dtype.itemsize < tensor.dtype.itemsize:
                narrow[name] = narrow[name].astype(value.dtype)
    if unknown:
        text = "came with the adapter and cannot be compared with this base model, whose own is used"
        warnings.warn(f"{', '.join(unknown)}: {text}", UserWarning, stacklevel=4)
    return list(base_problems(narrow, base))


def _value(layers: Mapping[str, Any], name: str) -> np.ndarray | None:
    """The base's tensor in PyTorch's axes; None if it cannot be told, or only rounded."""
    module, _, parameter = name.rpartition(".")
    if module == "lm_head" and module not in layers:
        module = "model.embed_tokens"  # tied
    layer = layers.get(module)
    if isinstance(layer, nnx.Embed) and parameter == "weight":
        return whole(layer.embedding[...])
    if isinstance(layer, nnx.Linear) and parameter == "weight":
        return whole(layer.kernel[...]).T
    if isinstance(layer, Norm) and parameter == "weight":
        return whole(layer.weight[...])
    if isinstance(layer, nnx.Linear) and parameter == "bias" and layer.bias is not None:
        return whole(layer.bias[...])
    return None
