"""Batches of a few fixed shapes, in an order that depends on the seed alone and can be restored."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from moe_lora_jax.train.examples import Example
from moe_lora_jax.train.step import Batch

SHORTEST_BUCKET = 32


class HostBatch(NamedTuple):
    """A batch of numpy arrays, which the jitted steps take as they are.

    lines: [row], their numbers in the data file; 0 for rows that only fill the batch up.
    """

    batch: Batch
    lines: np.ndarray


def bucket_lengths(longest: int) -> tuple[int, ...]:
    """The sequence lengths that batches are padded to: 32, 64, 128, ... and `longest` rounded up to a multiple of 8.

    Every length is one compile of the step, so their number is logarithmic.
    """
    last = -(-longest // 8) * 8
    powers = []
    length = SHORTEST_BUCKET
    while length < last:
        powers.append(length)
        length *= 2
    return (*powers, last)


def collate(examples: Sequence[Example], rows: int, lengths: Sequence[int], pad_id: int) -> HostBatch:
    """Pads on the right to the smallest of `lengths` that holds every example, and with blank rows up to `rows`."""
    length = next(n for n in lengths if n >= max(len(e.ids) for e in examples))
    ids: Any = np.full((rows, length), pad_id, np.int32)
    real: Any = np.zeros((rows, length), np.int32)
    counted: Any = np.zeros((rows, length), bool)
    lines = np.zeros(rows, np.int64)
    for row, example in enumerate(examples):
        n = len(example.ids)
        ids[row, :n], real[row, :n], counted[row, :n], lines[row] = example.ids, 1, example.counted, example.line
    return HostBatch(Batch(ids, real, counted), lines)


class TrainBatches(Iterator[HostBatch]):
    """The batches of the optimizer's steps: [gradient_accumulation, batch_size, seq].

    Every epoch is a new permutation; batches run on across the border of two epochs. `state` and `restore` save and
    set the position.

    Args:
        examples: the training data.
        batch_size: rows of a micro-batch.
        gradient_accumulation: micro-batches of a step.
        epochs: passes over the examples. The last batch is filled up with blank rows.
        seed: of the permutations.
        pad_id: the padding token.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        gradient_accumulation: int,
        epochs: int,
        seed: int,
        pad_id: int,
    ):
        rows = batch_size * gradient_accumulation
        lengths = bucket_lengths(max(len(e.ids) for e in examples))

        def micro_batches(chosen: Sequence[Example]) -> HostBatch:
            batch, lines = collate(chosen, rows, lengths, pad_id)
            return HostBatch(jax.tree.map(lambda x: x.reshape(gradient_accumulation, batch_size, -1), batch), lines)

        dataset = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(epochs)
        dataset = dataset.batch(rows, drop_remainder=False, batch_fn=micro_batches)
        self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def __next__(self) -> HostBatch:
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """The position after the batches taken so far, as JSON values."""
        return self._iterator.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the position that `state` was taken at."""
        self._iterator.set_state(state)


def eval_batches(examples: Sequence[Example], *, batch_size: int, pad_id: int) -> Iterator[HostBatch]:
    """Every example once, in [batch_size, seq]; sorted by length, so that little of it is padding."""
    lengths = bucket_lengths(max(len(e.ids) for e in examples))
    ordered = sorted(examples, key=lambda e: (len(e.ids), e.line))
    for start in range(0, len(ordered), batch_size):
        yield collate(ordered[start : start + batch_size], batch_size, lengths, pad_id)
