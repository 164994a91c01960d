"""Adapters are trained in fp32, and written in the dtype of the file that they came from.

An update is often smaller than half a step of bf16, and would vanish if A and B were kept in it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.disk.lazy import Tensor
from moe_lora_interop.errors import CheckpointError

DTYPES = ("float32", "bfloat16", "float16")
EXPERTS = ("lora_A", "lora_B")
Slot = tuple[str, str]
FileDtypes = tuple[tuple[Slot, str], ...]
"""((module, role), dtype) of the tensors whose dtype in the file is not the one they are trained in."""


def for_training(adapter: Adapter, param_dtype: Any) -> tuple[Adapter, FileDtypes]:
    """The adapter with A and B in `param_dtype` and its routers in fp32, and the dtypes that they had.

    None changes nothing.
    """
    if param_dtype is None:
        return adapter, ()
    wanted = checked(param_dtype, "param_dtype")
    tensors = {
        slot: np.asarray(tensor).astype(wanted if slot[1] in EXPERTS else np.float32)
        for slot, tensor in adapter.tensors.items()
    }
    before = {
        slot: tensor.dtype.name for slot, tensor in adapter.tensors.items() if tensor.dtype != tensors[slot].dtype
    }
    return replace(adapter, tensors=tensors), tuple(sorted(before.items()))


def for_file(tensors: Mapping[Slot, Tensor], before: FileDtypes, dtype: Any = None) -> dict[Slot, np.ndarray]:
    """The tensors in the dtypes that are written: as they were in the file, or A and B in `dtype`.

    What `for_training` only widened comes back bit by bit if nothing was trained.

    Raises:
        CheckpointError: values that are finite and would not be.
    """
    wanted: dict[Slot, Any] = dict(before)
    if dtype is not None:
        wanted = dict.fromkeys((slot for slot in tensors if slot[1] in EXPERTS), checked(dtype, "dtype"))
    arrays = {slot: np.asarray(tensor) for slot, tensor in tensors.items()}
    with np.errstate(over="ignore"):
        cast = {slot: array.astype(jnp.dtype(wanted.get(slot, array.dtype))) for slot, array in arrays.items()}
    problems = [
        f"{module} {role}: has values up to {np.abs(arrays[module, role]).max():.3g}, too large for {found.dtype}"
        for (module, role), found in cast.items()
        if found.dtype.itemsize < arrays[module, role].itemsize and _overflows(arrays[module, role], found)
    ]
    if problems:
        raise CheckpointError("cannot be written in this dtype", [*problems, "dtype='float32' holds them"])
    return cast


def checked(dtype: Any, name: str) -> np.dtype:
    """Raises ValueError unless it is a dtype that adapters have."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        shown = repr(dtype) if found is None else found.name
        raise ValueError(f"{name}: found {shown}, expected None or one of {', '.join(DTYPES)}")
    return found


def _overflows(values: np.ndarray, cast: np.ndarray) -> bool:
    return bool((np.isfinite(values) & np.isinf(cast.astype(np.float32))).any())
