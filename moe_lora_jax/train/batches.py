"""Batches of a few fixed shapes, in an order that depends on the seed alone and can be restored."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from moe_lora_jax.train.examples import Example, Examples
from moe_lora_jax.train.packing import PackedRows
from moe_lora_jax.train.step import Batch

SHORTEST_BUCKET = 32


class HostBatch(NamedTuple):
    """A batch of numpy arrays, which the jitted steps take as they are.

    lines: of its examples in the data file, row by row; 0 for each row that only fills the batch up.
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
    batch, lines = collate_packed([[example] for example in examples], rows, lengths, pad_id)
    return HostBatch(batch._replace(segment_ids=None), lines)


def collate_packed(packed: Sequence[Sequence[Example]], rows: int, lengths: Sequence[int], pad_id: int) -> HostBatch:
    """`collate` of rows that each hold several examples, one after the other: segments 1, 2, ..., padding 0."""
    length = next(n for n in lengths if n >= max(sum(len(e.ids) for e in row) for row in packed))
    ids: Any = np.full((rows, length), pad_id, np.int32)
    segments: Any = np.zeros((rows, length), np.int32)
    counted: Any = np.zeros((rows, length), bool)
    lines = []
    for row, examples in enumerate(packed):
        begin = 0
        for number, example in enumerate(examples, start=1):
            end = begin + len(example.ids)
            here = row, slice(begin, end)
            ids[here], segments[here], counted[here] = example.ids, number, example.counted
            if begin:  # what stands before it is another example's, no prediction of it
                counted[row, begin] = False
            lines.append(example.line)
            begin = end
    lines += [0] * (rows - len(packed))
    real: Any = (segments > 0).astype(np.int32)
    return HostBatch(Batch(ids, real, counted, segments), np.array(lines, np.int64))


class TrainBatches(Iterator[HostBatch]):
    """The batches of the optimizer's steps: [gradient_accumulation, batch_size, seq].

    Every epoch is a new permutation; batches run on across the border of two epochs. `state` and `restore` save and
    set the position.

    Args:
        examples: the training data, one in each row, or several (`PackedRows`).
        batch_size: rows of a micro-batch.
        gradient_accumulation: micro-batches of a step.
        epochs: passes over them. The last batch is filled up with blank rows.
        seed: of the permutations.
        pad_id: the padding token.
    """

    def __init__(
        self,
        examples: Sequence[Example] | PackedRows,
        *,
        batch_size: int,
        gradient_accumulation: int,
        epochs: int,
        seed: int,
        pad_id: int,
    ):
        rows = batch_size * gradient_accumulation
        source = examples if isinstance(examples, PackedRows) else Examples.of(examples)
        collated: Any = collate_packed if isinstance(source, PackedRows) else collate
        lengths = bucket_lengths(source.longest)

        def micro_batches(chosen: Sequence[Any]) -> HostBatch:
            batch, lines = collated(chosen, rows, lengths, pad_id)
            return HostBatch(jax.tree.map(lambda x: x.reshape(gradient_accumulation, batch_size, -1), batch), lines)

        dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(epochs)
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
    stored = Examples.of(examples)
    lengths = bucket_lengths(stored.longest)
    order = np.lexsort((stored.lines, stored.lengths))
    for start in range(0, len(order), batch_size):
        yield collate(stored.take(order[start : start + batch_size]), batch_size, lengths, pad_id)


def padding_share(lengths: np.ndarray, rows: int, seed: int) -> float:
    """The part of an epoch's tokens that is padding, for batches of so many examples each, in an order at random."""
    whole = max(len(lengths) // rows, 1)
    shuffled = np.random.default_rng(seed).permutation(lengths)[: whole * rows]
    longest = shuffled.reshape(whole, -1).max(axis=1)
    buckets = np.array(bucket_lengths(int(lengths.max())))
    padded = buckets[np.searchsorted(buckets, longest)].sum() * (len(shuffled) // whole)
    return 1 - float(shuffled.sum() / padded)
