"""Several mixtures on one base model: loaded, chosen row by row, exchanged, trained together and saved."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import moe_lora_interop
from moe_lora_interop.checkpoint.adapter import Adapter, config_sizes
from moe_lora_interop.checkpoint.read_write import read_with_base
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.rules.tensors import decode, encode
from moe_lora_jax.adapters.apply import linear_layers, remove_moe_lora
from moe_lora_jax.adapters.authenticity import check_ours
from moe_lora_jax.adapters.base_check import check_fits
from moe_lora_jax.adapters.dtypes import FileDtypes, for_file, for_training
from moe_lora_jax.adapters.jax_tree import JAX_TREE
from moe_lora_jax.adapters.model_spec import ModelSpec
from moe_lora_jax.layers.linear import MoeLoraLinear
from moe_lora_jax.layers.mixing import MoeLoraParam
from moe_lora_jax.layers.multi_adapter import MultiAdapterLinear
from moe_lora_jax.layers.shared import Shared
from moe_lora_jax.tree import has_adapter, replace_module

BASE = "__base__"
"""The name, PEFT's, of a row without adapter."""

Source = str | os.PathLike[str] | Adapter


class AdapterBank:
    """Puts adapters on a base model, in place, and chooses one for every row of its batches.

    The adapters' values and the choice of rows are variables of the model: `select` and `replace` change no shape and
    nothing static, so a compiled program stays valid. Adapters with equal configs are stacked; each further config
    costs the work of one more adapter. All trainable variables are `MoeLoraParam`s with a leading adapter axis, and a
    row's gradient reaches its own adapter only. What routers decide is not collected: no balancing losses.

    Example:
        >>> bank = AdapterBank(model, {"french": "french_dir", "german": "german_dir"})
        >>> bank.select(["german", "french", "__base__"])
        >>> logits = model(ids)  # three rows

    Args:
        model: a base model without an adapter, ours or any other whose layers see [batch, ...] inputs.
        adapters: {name: a directory in any readable layout, or an `moe_lora_interop.Adapter`}.
        param_dtype: dtype in which A and B are kept and trained, as for `load_adapter`; None keeps each file's.
        spec: names and layer classes of a model that `load_base_model` did not make.

    Raises:
        CheckpointError: an adapter is for another base, has routers beside the layers, or needs task ids; or the model
            already has an adapter, which stays.
    """

    def __init__(
        self,
        model: nnx.Module,
        adapters: Mapping[str, Source],
        *,
        param_dtype: Any = jnp.float32,
        spec: ModelSpec | None = None,
    ):
        if has_adapter(model):
            raise CheckpointError("the model already has an adapter: call remove_moe_lora(model) first")
        if not adapters or BASE in adapters:
            raise CheckpointError("no bank", [f"adapters: found {list(adapters)}, expected names other than {BASE!r}"])
        self.model = model
        self.names = list(adapters)
        self._param_dtype, self._spec = param_dtype, spec or ModelSpec()
        self._linears = linear_layers(model, self._spec)
        read = [self._read(name, source) for name, source in adapters.items()]
        found = [adapter for adapter, _ in read]
        self._file_dtypes = [dtypes for _, dtypes in read]
        self._configs = [adapter.config for adapter in found]
        self._dtypes = [adapter.dtype for adapter in found]
        self._layers: dict[str, MultiAdapterLinear] = {}
        rows = Shared.empty()
        for module in sorted({m for adapter in found for m in adapter.modules}):
            self._layers[module] = self._wrap(module, found, rows)
        model.moe_lora_rows = rows  # type: ignore[attr-defined]

    def select(self, names: Sequence[str]) -> None:
        """One name for each row of the batches that follow; "__base__" for a row without adapter."""
        select_adapters(self.model, self.ids(names))

    def ids(self, names: Sequence[str]) -> jax.Array:
        """The numbers of these adapters, int32 [batch], for `select_adapters` inside a compiled function.

        Raises:
            ValueError: names that the bank does not have.
        """
        unknown = sorted(set(names) - {*self.names, BASE})
        if unknown:
            raise ValueError(f"names: found {unknown}, expected some of {[*self.names, BASE]}")
        return jnp.asarray([-1 if name == BASE else self.names.index(name) for name in names], jnp.int32)

    def replace(self, name: str, source: Source, *, new_name: str | None = None) -> None:
        """Puts another adapter with the same config in the place of `name`; no program is compiled anew.

        Raises:
            CheckpointError: its config or dtype is another: make a new bank.
            ValueError: no adapter of this name, or one of the new name.
        """
        number = self._number(name)
        adapter, dtypes = self._read(new_name or name, source)
        if new_name not in (None, name) and new_name in (*self.names, BASE):
            raise ValueError(f"new_name: found {new_name!r}, expected a name that the bank does not have")
        problems = _differences(adapter, self._configs[number], self._dtypes[number])
        if problems:
            raise CheckpointError(f"cannot take the place of {name!r} without compiling anew", problems)
        values = _encoded(adapter)
        for path, variable, place in self._variables(number):
            variable[...] = variable[...].at[place].set(jnp.asarray(values[path]))
        self.names[number], self._file_dtypes[number] = new_name or name, dtypes

    def adapter(self, name: str, *, dtype: Any = None) -> Adapter:
        """The adapter of this name as it is now; `dtype` as for `mlj.to_adapter`.

        Raises:
            ValueError: no adapter of this name.
            CheckpointError: as `mlj.to_adapter` does.
        """
        number = self._number(name)
        for module, layer in self._layers.items():
            for stack, members in zip(layer.stacks, layer.members, strict=True):
                if number in members:
                    check_ours(stack, self._configs[number], module)
        stored = {path: np.asarray(jax.device_get(v[...][place])) for path, v, place in self._variables(number)}
        config = self._configs[number]
        tensors, problems = decode(JAX_TREE.rules, stored, config_sizes(config))
        assert not problems, problems
        return Adapter(config, for_file(tensors, self._file_dtypes[number], dtype))

    def save_pretrained(self, name: str, directory: str | os.PathLike[str], *, dtype: Any = None) -> None:
        """Writes one adapter in the native layout, as `mlj.save_pretrained` does for a model with one."""
        moe_lora_interop.write(self.adapter(name, dtype=dtype), directory)

    def remove(self) -> nnx.Module:
        """Takes all adapters off the model, in place, and returns it."""
        return remove_moe_lora(self.model)

    def _read(self, name: str, source: Source) -> tuple[Adapter, FileDtypes]:
        adapter = source if isinstance(source, Adapter) else read_with_base(source)
        adapter, dtypes = for_training(adapter, self._param_dtype)
        config = adapter.config
        fields = {"scope": "linear", "router_input": "hidden", "modules_to_save": None}
        problems = [
            f"{field}: found {getattr(config, field)!r}, expected {expected!r} where rows have adapters of their own"
            for field, expected in fields.items()
            if getattr(config, field) != expected
        ]
        if problems:
            raise CheckpointError(f"the adapter {name!r} cannot be one of several", problems)
        check_fits(self.model, self._linears, adapter, self._spec)
        return adapter, dtypes

    def _number(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"name: found {name!r}, expected one of {self.names}")
        return self.names.index(name)

    def _wrap(self, module: str, adapters: Sequence[Adapter], rows: Shared) -> MultiAdapterLinear:
        linear, members = self._linears[module], dict[Any, list[int]]()
        for number, adapter in enumerate(adapters):
            if module in adapter.modules:
                members.setdefault((adapter.config, self._dtypes[number]), []).append(number)
        stacks = []
        for (config, dtype), numbers in members.items():
            sizes, features = config.for_module(module), (linear.map.in_features, linear.map.out_features)
            stack = MoeLoraLinear(nnx.Module(), *features, sizes, config=config, param_dtype=dtype, rngs=nnx.Rngs(0))
            values = [_encoded(adapters[number], module) for number in numbers]
            for path, variable in nnx.to_flat_state(nnx.state(stack, MoeLoraParam)):
                name = _variable_name(module, path)
                nnx.update(
                    stack,
                    nnx.from_flat_state({path: variable.replace(jnp.stack([jnp.asarray(v[name]) for v in values]))}),
                )
            stacks.append(stack)
        layer = MultiAdapterLinear(linear.layer, linear.map, stacks, [tuple(n) for n in members.values()], rows)
        replace_module(self.model, linear.path, layer)
        return layer

    def _variables(self, number: int) -> list[tuple[str, Any, int]]:
        """(name in the layout jax_tree, stacked variable, place in the stack) of one adapter."""
        return [
            (_variable_name(module, path), _variable(stack, path), members.index(number))
            for module, layer in self._layers.items()
            for stack, members in zip(layer.stacks, layer.members, strict=True)
            if number in members
            for path, _ in nnx.to_flat_state(nnx.state(stack, MoeLoraParam))
        ]


def select_adapters(model: Any, ids: jax.Array) -> None:
    """Sets the adapter of every row: integers [batch] from `AdapterBank.ids`. Also for use in compiled functions.

    Raises:
        ValueError: the model has no bank, or the ids are no integers [batch].
    """
    if getattr(model, "moe_lora_rows", None) is None:
        raise ValueError("model: found no AdapterBank on it, expected one")
    ids = jnp.asarray(ids)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids: found {ids.dtype} {list(ids.shape)}, expected integers [batch]")
    model.moe_lora_rows.set_value(ids)


def _encoded(adapter: Adapter, module: str | None = None) -> dict[str, np.ndarray]:
    """Tensors as the layout jax_tree stores them, of one module or of all."""
    tensors = {slot: t for slot, t in adapter.tensors.items() if module in (None, slot[0])}
    stored, problems = encode(JAX_TREE.rules, tensors, config_sizes(adapter.config))
    assert not problems, problems
    return {name: np.asarray(tensor) for name, tensor in stored.items()}


def _variable_name(module: str, path: tuple[Any, ...]) -> str:
    return ".".join(map(str, (module, *path)))


def _variable(owner: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        owner = getattr(owner, str(part))
    return owner


def _differences(adapter: Adapter, config: Any, dtype: np.dtype) -> list[str]:
    ours, theirs = config.semantic_dict(), adapter.config.semantic_dict()
    problems = [
        f"{n}: found {getattr(adapter.config, n)!r}, expected {getattr(config, n)!r}"
        for n in ours | theirs
        if ours.get(n) != theirs.get(n)
    ]
    if adapter.dtype != dtype:
        problems.append(f"dtype: found {adapter.dtype}, expected {dtype}")
    return problems
