"""Tokenized examples of all tasks in three splits that share no key, whatever the task: no country is in two."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.effect.tasks import WORDS, Item
from moe_lora_jax.train.data import Example

SPLITS = {"train": range(0, 14), "validation": range(14, 16), "test": range(16, 20)}  # of 20 parts
MOST = {"train": 400, "validation": 16, "test": 32}  # examples per task
LENGTH = 16  # tokens; longer examples are left out

Split = dict[str, list[Example]]


@dataclass(frozen=True)
class Data:
    """{task: examples} of each split; `left_out` counts items longer than LENGTH, by task."""

    train: Split
    validation: Split
    test: Split
    left_out: dict[str, int]

    @property
    def digest(self) -> str:
        """See `digest`."""
        return digest(self.train, self.validation, self.test)


def digest(*splits: Mapping[str, Sequence[Example]]) -> str:
    """A checksum that changes with every token of every example."""
    total = hashlib.sha256()
    for split in splits:
        for task, examples in split.items():
            for e in examples:
                total.update(repr((task, e.ids.tolist(), e.counted.tolist())).encode())
    return total.hexdigest()[:12]


def build(tasks: Mapping[str, Iterable[Item]], encode: Callable[[str], Sequence[int]], end: int) -> Data:
    """Tokenizes and splits; the answer and the end token are what the loss counts.

    Args:
        tasks: {name: its items}.
        encode: text to token ids, without special tokens.
        end: id of the end of a text.
    """
    splits: dict[str, Split] = {split: {} for split in SPLITS}
    left_out = dict.fromkeys(tasks, 0)
    for task, items in tasks.items():
        chosen: dict[str, list[Example]] = {split: [] for split in SPLITS}
        for item in sorted(items, key=lambda i: _hash(f"{task} {i.prompt}")):  # an order that means nothing
            if task in WORDS and len(encode(f" {item.key}")) > 1:
                continue
            (split,) = (name for name, parts in SPLITS.items() if _hash(item.key) % 20 in parts)
            prompt, answer = list(encode(item.prompt)), [*encode(f" {item.answer}"), end]
            if len(prompt) + len(answer) > LENGTH:
                left_out[task] += 1
            elif len(chosen[split]) < MOST[split]:
                counted = np.arange(len(prompt) + len(answer)) >= len(prompt)
                chosen[split].append(Example(np.array(prompt + answer, np.int32), counted, len(chosen[split]) + 1))
        for split, examples in chosen.items():
            splits[split][task] = examples
    return Data(**splits, left_out=left_out)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
