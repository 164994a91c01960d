"""Between an NNX model and an `moe_lora_interop.Adapter`: the parameter tree is one more layout."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import moe_lora_interop
from moe_lora_interop.checkpoint.adapter import Adapter, config_sizes
from moe_lora_interop.checkpoint.read_write import read_with_base
from moe_lora_interop.config.base_name import named
from moe_lora_interop.disk.hub import adapter_directory
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.export.combining import combine as combine_adapters
from moe_lora_interop.rules.tensors import decode, encode
from moe_lora_jax.adapters.apply import adapted_names, apply_to_modules, linear_layers
from moe_lora_jax.adapters.authenticity import check_ours
from moe_lora_jax.adapters.base_check import check_fits
from moe_lora_jax.adapters.dtypes import for_file, for_training
from moe_lora_jax.adapters.jax_tree import JAX_TREE
from moe_lora_jax.adapters.model_spec import ModelSpec
from moe_lora_jax.layers.mixing import MoeLoraParam
from moe_lora_jax.processes import once, whole
from moe_lora_jax.sharding import put_like
from moe_lora_jax.tree import has_adapter


def to_adapter(model: Any, *, dtype: Any = None) -> Adapter:
    """The adapter that `model` carries, as numpy arrays in canonical axes.

    Args:
        dtype: of A and B; routers are then in fp32. None: the dtypes of the file that the adapter came from, else
            those of the variables.

    Raises:
        CheckpointError: the model carries none, or several; its layers or routers are not what its config says
            (`authenticity`); a value is too large for the dtype.
        ValueError: no dtype that adapters have.
    """
    if not has_adapter(model):
        raise CheckpointError("the model has no adapter: call apply_moe_lora or load_adapter first")
    if not hasattr(model, "moe_lora_config"):
        raise CheckpointError(
            "the model has an AdapterBank: save its adapters by name, with the bank's save_pretrained"
        )
    config = model.moe_lora_config
    check_ours(model, config)
    stored = {path: whole(leaf) for path, leaf in _leaves(model).items()}
    tensors, problems = decode(JAX_TREE.rules, stored, config_sizes(config))
    if problems:
        raise CheckpointError("the model's adapter variables do not form an adapter", problems)
    return Adapter(config, for_file(tensors, getattr(model, "moe_lora_dtypes", ()), dtype))


def save_pretrained(
    model: nnx.Module, directory: str | os.PathLike[str], *, dtype: Any = None, base_name: str | None = None
) -> None:
    """Writes the model's adapter to `directory` in the native layout, which PEFT reads.

    With several processes all of them must call this; the first one writes.

    Args:
        dtype: as for `to_adapter`.
        base_name: what the base model is called where the adapter will be used, for example its id on the Hugging
            Face Hub. None: what the config says, which `apply_moe_lora` takes from the model.

    Raises:
        CheckpointError: as `to_adapter` does; or the directory cannot be written.
    """
    adapter = to_adapter(model, dtype=dtype)
    if base_name is not None:
        adapter = replace(adapter, config=named(adapter.config, base_name))
    once(lambda: moe_lora_interop.write(adapter, directory))


def load_adapter(
    model: nnx.Module,
    source: str | os.PathLike[str] | Adapter,
    *,
    revision: str | None = None,
    layout: str | None = None,
    rngs: nnx.Rngs | None = None,
    param_dtype: Any = jnp.float32,
    spec: ModelSpec | None = None,
    **options: Any,
) -> nnx.Module:
    """Applies a stored adapter's config to a base model, in place, then its weights. Returns the model.

    Args:
        model: a base model without an adapter.
        source: a directory in any readable layout, an id on the Hugging Face Hub, or an `moe_lora_interop.Adapter`.
        revision: branch, tag or commit of an id.
        layout: the layout's name, as for `moe_lora_interop.read`.
        options: what the layout does not record, as for `moe_lora_interop.read`.
        rngs: stream "dropout", for training on; default `nnx.Rngs(0)`.
        param_dtype: dtype in which A and B are kept and trained; routers are then in fp32. `save_pretrained` writes the
            file's dtypes again. None: the file's dtypes, which take less memory and train badly.
        spec: names and layer classes of a model that `load_base_model` did not make, as for `apply_moe_lora`.

    Raises:
        CheckpointError: unreadable, or for another base model (`base_check.check_fits`): every module that is missing
            there or has other sizes is listed, and the model is left as it was.
        ValueError: no dtype that adapters have.
    """
    if has_adapter(model):
        raise CheckpointError("the model already has an adapter: call remove_moe_lora(model) first")
    if isinstance(source, Adapter):
        if revision is not None:
            raise CheckpointError("an Adapter has no revisions", [f"revision: found {revision!r}, expected None"])
        adapter = source
    else:
        adapter = read_with_base(adapter_directory(source, revision), layout, **options)
    adapter, dtypes = for_training(adapter, param_dtype)
    config = adapter.config
    if config.modules_to_save:
        raise CheckpointError(
            "cannot be loaded in JAX", [f"modules_to_save: found {config.modules_to_save}, expected null: PyTorch only"]
        )
    spec = spec or ModelSpec()
    check_fits(model, linear_layers(model, spec), adapter, spec)
    apply_to_modules(model, config, adapter.modules, rngs=rngs or nnx.Rngs(0), param_dtype=adapter.dtype, spec=spec)
    stored, problems = encode(JAX_TREE.rules, adapter.tensors, config_sizes(config))
    names = adapted_names(model)
    state = [(path, _name(path, names), v) for path, v in nnx.to_flat_state(nnx.state(model, MoeLoraParam))]
    assert not problems and stored.keys() == {name for _, name, _ in state}, "checked against the config before"
    filled = {
        path: variable.replace(put_like(np.asarray(stored[name]), variable[...])) for path, name, variable in state
    }
    nnx.update(model, nnx.from_flat_state(filled))
    if dtypes:
        model.moe_lora_dtypes = dtypes  # type: ignore[attr-defined]
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
