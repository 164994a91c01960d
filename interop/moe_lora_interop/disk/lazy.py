"""Tensors that are still in a file: dtype and shape are known, values are read when they are asked for.

The rules move a `Lazy` as they move an array, so that a conversion is planned from headers alone and then has one
tensor in memory at a time. `np.asarray` reads it. Annotations call it an array: it has what the rules use of one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np


@dataclass(frozen=True, eq=False)
class Lazy:
    """A tensor by its dtype, its shape and how to read it.

    Attributes:
        read: gives the values; every call reads again, so that nothing is kept.
        part: gives `self[i]`, i along the first axis, where that is less work than reading everything.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    part: Callable[[int], np.ndarray] | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(), dtype=dtype, copy=copy)

    def __getitem__(self, index: int | slice | tuple[int | slice | None, ...] | None) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if self.part is not None and isinstance(first, int):
            part = self.part(first)
            return part[tuple(rest)] if rest else part
        return self._then(lambda array: array[index])

    def reshape(self, shape: tuple[int, ...]) -> np.ndarray:
        return cast(np.ndarray, self) if shape == self.shape else self._then(lambda array: array.reshape(shape))

    def transpose(self, axes: Sequence[int]) -> np.ndarray:
        in_order = [*axes] == [*range(self.ndim)]
        return cast(np.ndarray, self) if in_order else self._then(lambda array: array.transpose(axes))

    def _then(self, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        stand_in = np.broadcast_to(np.empty((), self.dtype), self.shape)  # any shape, in the memory of one value
        return lazy_tensor(self.dtype, change(stand_in).shape, lambda: change(self.read()))

    def tobytes(self) -> bytes:
        return self.read().tobytes()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize


def lazy_tensor(
    dtype: np.dtype,
    shape: tuple[int, ...],
    read: Callable[[], np.ndarray],
    part: Callable[[int], np.ndarray] | None = None,
) -> np.ndarray:
    """A `Lazy`, where an array is expected."""
    return cast(np.ndarray, Lazy(dtype, shape, read, part))


def in_memory(array: np.ndarray) -> np.ndarray:
    """An array as a `Lazy`, so that stacking it can wait."""
    return lazy_tensor(array.dtype, array.shape, lambda: array, lambda i: in_memory(array[i]))


def stack(parts: Sequence[np.ndarray], counts: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The tensor [*counts, *shape] of these parts side by side, each zero-padded to `shape`; lazy if they are."""
    stacked = _stacked(parts, counts, shape)
    return stacked if any(isinstance(part, Lazy) for part in parts) else np.asarray(stacked)


def _stacked(parts: Sequence[np.ndarray], counts: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    if not counts and parts[0].shape == shape:
        return parts[0]

    def read() -> np.ndarray:
        out = np.zeros((len(parts), *shape), parts[0].dtype)
        for n, part in enumerate(parts):
            place: tuple[int | slice, ...] = (n, *map(slice, part.shape))
            out[place] = np.asarray(part)
        return out.reshape((*counts, *shape))

    def part(i: int) -> np.ndarray:
        each = len(parts) // counts[0]
        return _stacked(parts[i * each : (i + 1) * each], counts[1:], shape)

    return lazy_tensor(parts[0].dtype, (*counts, *shape), read, part if counts else None)


def raw(tensor: np.ndarray) -> memoryview:
    """The bytes as files have them: row-major, little-endian."""
    array = np.ascontiguousarray(tensor).reshape(-1)
    little = array.astype(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array
    return little.view(np.uint8).data
