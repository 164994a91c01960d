"""Examples on disk: a data file of any size is read, split, sorted and trained on in constant memory."""

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Self, overload

import numpy as np

from moe_lora_jax.train.errors import DataError

_BUFFER = 2**20  # bytes of a file that are written at once


@dataclass(frozen=True)
class Example:
    """One sequence. ids: [seq] int32. counted: [seq] bool, true for targets. line: its number in the file, from 1
    (in a JSON array that of the element, in parquet that of the row).
    """

    ids: np.ndarray
    counted: np.ndarray
    line: int


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Sequences in a few flat arrays, which may lie on disk; its elements are views.

    ids: [token] int32. counted: [token] bool. begins, lengths, lines: [example] int64, where in the others an example
    begins, how many tokens it has, and its line.
    """

    ids: np.ndarray
    counted: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    lines: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Examples":
        """The same examples; copied into memory, unless they are of this kind already."""
        if isinstance(examples, Examples):
            return examples
        lengths = np.array([len(e.ids) for e in examples], np.int64)
        ids = np.concatenate([np.zeros(0, np.int32), *(e.ids for e in examples)])
        counted = np.concatenate([np.zeros(0, bool), *(e.counted for e in examples)])
        return cls(ids, counted, np.cumsum(lengths) - lengths, lengths, np.array([e.line for e in examples], np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest one."""
        return int(self.lengths.max())

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> "Examples": ...

    def __getitem__(self, index: int | slice) -> "Example | Examples":
        if isinstance(index, slice):
            return self.take(index)
        begin = int(self.begins[index])
        end = begin + int(self.lengths[index])
        return Example(self.ids[begin:end], self.counted[begin:end], int(self.lines[index]))

    def take(self, chosen: np.ndarray | slice) -> "Examples":
        """Some of them, in this order. Tokens are not copied."""
        return Examples(self.ids, self.counted, self.begins[chosen], self.lengths[chosen], self.lines[chosen])

    def __repr__(self) -> str:
        return f"<{len(self)} examples>"


class ExampleWriter:
    """Takes examples one by one and keeps none of them in memory: use as a context manager.

    They go to temporary files without a name (in TMPDIR, else where the system has its own), which are gone with the
    `Examples`, or with the process. A token takes 5 bytes there, an example 24.

    Raises:
        DataError: nothing can be written there, or the disk is full.
    """

    def __init__(self) -> None:
        self._tokens = 0
        with _explained():
            self._files = [tempfile.TemporaryFile(buffering=_BUFFER) for _ in range(3)]
        self._ids, self._counted, self._index = self._files

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            with suppress(OSError):  # a full disk, which `add` has told
                file.close()

    def add(self, ids: Sequence[int], counted: Sequence[bool], line: int) -> None:
        """Appends one."""
        with _explained():
            self._ids.write(np.array(ids, np.int32).data)
            self._counted.write(bytes(counted))
            self._index.write(np.array((self._tokens, len(ids), line), np.int64).data)
        self._tokens += len(ids)

    def examples(self) -> Examples:
        """All of them, in the order they came."""
        index = _mapped(self._index).view(np.int64).reshape(-1, 3)
        ids, counted = _mapped(self._ids).view(np.int32), _mapped(self._counted).view(bool)
        return Examples(ids, counted, *index.T)


def _mapped(file: IO[bytes]) -> np.ndarray:
    """The bytes of a file, read when they are used. The array keeps it on the disk, closed or not."""
    with _explained():
        file.flush()
        if file.tell() == 0:
            return np.zeros(0, np.uint8)  # nothing cannot be mapped
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "tokens are kept there while they are needed; TMPDIR chooses another folder"
        raise DataError("cannot keep the data", [f"{tempfile.gettempdir()}: {error.strerror}: {hint}"]) from error
