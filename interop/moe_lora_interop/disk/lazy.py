"""Tensors that are still in a file: dtype and shape are known, values are read when they are asked for.

The rules move a `Lazy` as they move an array, so that a conversion is planned from headers alone and then has one
tensor in memory at a time. `np.asarray` reads it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Index = int | slice | tuple[int | slice | None, ...] | None


class Tensor(Protocol):
    """What the rules use of a tensor: an array has it, and so has a `Lazy`."""

    @property
    def dtype(self) -> np.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def itemsize(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __array__(self) -> np.ndarray: ...
    def __getitem__(self, index: Index, /) -> "Tensor": ...
    def reshape(self, shape: tuple[int, ...], /) -> "Tensor": ...
    def transpose(self, axes: Sequence[int], /) -> "Tensor": ...
    def tobytes(self) -> bytes: ...


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
    part: "Callable[[int], Tensor] | None" = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(), dtype=dtype, copy=copy)

    def __getitem__(self, index: Index, /) -> Tensor:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if self.part is not None and isinstance(first, int):
            part = self.part(first)
            return part[tuple(rest)] if rest else part
        return self._then(lambda array: array[index])

    def reshape(self, shape: tuple[int, ...], /) -> "Lazy":
        return self if shape == self.shape else self._then(lambda array: array.reshape(shape))

    def transpose(self, axes: Sequence[int], /) -> "Lazy":
        in_order = [*axes] == [*range(self.ndim)]
        return self if in_order else self._then(lambda array: array.transpose(axes))

    def _then(self, change: Callable[[np.ndarray], np.ndarray]) -> "Lazy":
        stand_in = np.broadcast_to(np.empty((), self.dtype), self.shape)  # any shape, in the memory of one value
        return Lazy(self.dtype, change(stand_in).shape, lambda: change(self.read()))

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


def in_memory(array: np.ndarray) -> Lazy:
    """An array as a `Lazy`, so that stacking it can wait."""
    return Lazy(array.dtype, array.shape, lambda: array, lambda i: in_memory(array[i]))


def stack(parts: Sequence[Tensor], counts: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The tensor [*counts, *shape] of these parts side by side, each zero-padded to `shape`; lazy if they are."""
    stacked = _stacked(parts, counts, shape)
    return stacked if any(isinstance(part, Lazy) for part in parts) else np.asarray(stacked)


def _stacked(parts: Sequence[Tensor], counts: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    if not counts and parts[0].shape == shape:
        return parts[0]

    def read() -> np.ndarray:
        out = np.zeros((len(parts), *shape), parts[0].dtype)
        for n, part in enumerate(parts):
            place: tuple[int | slice, ...] = (n, *map(slice, part.shape))
            out[place] = np.asarray(part)
        return out.reshape((*counts, *shape))

    def part(i: int) -> Tensor:
        each = len(parts) // counts[0]
        return _stacked(parts[i * each : (i + 1) * each], counts[1:], shape)

    return Lazy(parts[0].dtype, (*counts, *shape), read, part if counts else None)


def raw(tensor: Tensor) -> memoryview:
    """The bytes as files have them: row-major, little-endian."""
    array = np.ascontiguousarray(tensor).reshape(-1)
    little = array.astype(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array
    return little.view(np.uint8).data
