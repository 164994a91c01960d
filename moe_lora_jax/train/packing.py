"""Several examples in one row: which go together is planned once for a run, from their lengths alone."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import overload

import numpy as np

from moe_lora_jax.train.data import TokenData
from moe_lora_jax.train.examples import Example, Examples
from moe_lora_jax.train.settings import TrainSettings


class PackedRows(Sequence[Sequence[Example]]):
    """Rows of several whole examples by best-fit decreasing: the longest example first, each into the fullest row that
    has space for it. Their number is known before training, as the learning rate needs it; where rows are filled while
    the data are read (`grain.experimental.BestFitPackIterDataset`) it is not.

    The plan is a function of the lengths, `length` and `seed`, which says which of several equally long examples is
    first. Reference: Ding et al., Fewer Truncations Improve Language Modeling, 2024 (arXiv:2404.10830).

    Args:
        examples: each goes into one row.
        length: tokens that a row has space for; not less than the longest example.
        seed: of the order of examples of the same length.
    """

    def __init__(self, examples: Sequence[Example], length: int, *, seed: int):
        self.examples, self.length = Examples.of(examples), length
        lengths = self.examples.lengths.astype(np.int32)  # in memory, as the plan is
        shuffled = np.random.default_rng(seed).permutation(len(lengths))
        order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
        rows = best_fit(lengths[order], length)
        self._order = order[np.argsort(rows, kind="stable")]
        self._ends = np.cumsum(np.bincount(rows))
        self.longest = int(np.bincount(rows, weights=lengths[order]).max())
        self.tokens = int(lengths.sum())

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Examples: ...

    @overload
    def __getitem__(self, index: slice) -> list[Examples]: ...

    def __getitem__(self, index: int | slice) -> Examples | list[Examples]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = self._ends[index]
        begin = self._ends[index - 1] if index % len(self) else 0
        return self.examples.take(self._order[begin:end])

    def __repr__(self) -> str:
        return f"<{len(self.examples)} examples in {len(self)} rows of up to {self.length} tokens>"

    def describe(self) -> str:
        """One line for people: how many rows, and how full they are."""
        full = self.tokens / (len(self) * self.length)
        return f"packing: {len(self.examples)} examples in {len(self)} rows of {self.length} tokens, {full:.1%} full"


def training_rows(data: TokenData, settings: TrainSettings) -> Examples | PackedRows:
    """What a run has in the rows of its batches: one example each or, with `packing`, as many as fit into the
    max_length that the data were read with (into the length of the longest, if that is not known).
    """
    if not settings.packing:
        return Examples.of(data.examples)
    return PackedRows(data.examples, max(data.max_length or 0, data.longest), seed=settings.seed)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The number of the row that each example goes into, by best fit in the order given.

    Equally long examples are placed at once: each of the rows with the least space that is enough takes as many as fit.
    So the work grows with the number of lengths rather than of examples.

    Args:
        lengths: [example] integers from 1 to capacity, decreasing.
        capacity: tokens of a row.
    """
    rows = np.empty(len(lengths), np.int64)
    by_space: dict[int, list[np.ndarray]] = {}  # rows that have so much space left
    spaces: list[int] = []  # its keys, increasing
    made = begin = 0

    def keep(which: np.ndarray, space: int) -> None:
        if len(which) and space:
            if space not in by_space:
                by_space[space] = []
                insort(spaces, space)
            by_space[space].append(which)

    borders = np.flatnonzero(np.diff(lengths)) + 1
    for end in [*borders.tolist(), len(lengths)]:
        length = int(lengths[begin])
        while begin < end:
            at = bisect_left(spaces, length)
            if at < len(spaces):
                space = spaces.pop(at)
                which = np.concatenate(by_space.pop(space))
            else:
                space = capacity
                which = made + np.arange(-(-(end - begin) // (space // length)))
                made += len(which)
            each = space // length
            whole = min((end - begin) // each, len(which))
            rows[begin : begin + whole * each] = np.repeat(which[:whole], each)
            keep(which[:whole], space - each * length)
            begin, which = begin + whole * each, which[whole:]
            if len(which) and begin < end:  # the last of this length: fewer than a row takes
                rows[begin:end] = which[0]
                keep(which[:1], space - (end - begin) * length)
                begin, which = end, which[1:]
            keep(which, space)
    return rows
