"""From a data file to token sequences. Every bad line is named; nothing is cut or dropped without a word."""

import os
import zlib
from array import array
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_lora_jax.models.vocabulary import outside
from moe_lora_jax.train.errors import BadLine, DataError
from moe_lora_jax.train.examples import Example, Examples, ExampleWriter
from moe_lora_jax.train.records import EXPECTED, Encoder
from moe_lora_jax.train.tables import read_records

_SHOWN = 100  # bad lines, and unused keys, that are named; more of them are counted


@dataclass(frozen=True)
class Tally:
    """How often something was met in a file, and the numbers of the first lines where."""

    count: int = 0
    lines: tuple[int, ...] = ()

    def plus(self, line: int, count: int = 1) -> "Tally":
        """With one more line, where it was met so often."""
        return Tally(self.count + count, self.lines if len(self.lines) > 5 else (*self.lines, line))

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        return f"lines {', '.join(map(str, self.lines[:5]))}{', ...' if len(self.lines) > 5 else ''}"


@dataclass(frozen=True)
class TokenData:
    """The examples of one file, and what the length limit did to them.

    Attributes:
        file: where they come from.
        examples: at least one; each counts at least one token.
        truncated: examples that were cut at max_length.
        dropped: lines left out because the cut took every counted token.
        unused: {key of a line that nothing reads: on how many lines}; None stands for those after the first 100.
        lost: turns of the assistant that carry no loss, because the template renders them differently later.
        endless: lines whose last answer ends with no token of its own.
        max_length: the limit that they were read with.
    """

    file: Path
    examples: Sequence[Example]
    truncated: Tally = Tally()
    dropped: Tally = Tally()
    unused: Mapping[str | None, int] = field(default_factory=dict)
    lost: Tally = Tally()
    endless: Tally = Tally()
    max_length: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return Examples.of(self.examples).longest

    @property
    def digest(self) -> str:
        """Checksum of all tokens and masks: whether a resumed run sees the same data."""
        total = 0
        for e in self.examples:
            total = zlib.crc32(e.counted.tobytes(), zlib.crc32(e.ids.tobytes(), total))
        return f"{len(self.examples)} examples, crc32 {total:08x}"

    def describe(self) -> str:
        """One line for people: how many examples and tokens, and what was cut."""
        tokens = int(Examples.of(self.examples).lengths.sum())
        counted = sum(int(e.counted[1:].sum()) for e in self.examples)
        text = f"{self.file}: {len(self.examples)} examples, {tokens} tokens ({counted} with loss)"
        if self.truncated:
            text += f"; {self.truncated.count} cut at max_length ({self.truncated})"
        if self.dropped:
            text += f"; {self.dropped.count} left out, no token with loss within max_length ({self.dropped})"
        if self.lost:
            text += (
                f"; {self.lost.count:,} earlier turns of the assistant carry no loss, because the chat "
                f"template renders them differently once more messages follow ({self.lost}): mark them "
                "with {% generation %} in a template of your own (--chat-template)"
            )
        if self.endless:
            text += (
                f"; {self.endless.count:,} conversations end with no token with loss that ends an answer "
                f"({self.endless}), so nothing teaches the model to stop: put one into the assistant's turn "
                "in a template of your own (--chat-template)"
            )
        for key, count in self.unused.items():
            what = "more unused keys" if key is None else f"unused key {key!r}"
            text += f"; {what} on {count:,} {'line' if count == 1 else 'lines'}"
        return text


def read_data(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    max_length: int,
    vocab_size: int | None = None,
    keys: Collection[str] = (),
) -> TokenData:
    """Reads and tokenizes a data file. Lines of JSONL and rows of parquet are read one after the other and their tokens
    kept on disk (`ExampleWriter`), so the memory it takes does not grow with them; a JSON array is held whole.

    Args:
        path: objects in the forms of `records`: one on each line (JSONL, UTF-8, blank lines are skipped), or a JSON
            array of them, either of them gzipped, or parquet.
        tokenizer: from `load_tokenizer`.
        max_length: longer sequences are cut on the right; at least 2.
        vocab_size: of the model; a larger token id is an error.
        keys: of the records that the caller reads itself (`split_by`).

    Raises:
        DataError: the file is missing, empty, in another format or has bad lines: the first 100 are listed.
    """
    path = Path(path)
    problems = Problems()
    truncated = dropped = lost = endless = Tally()
    unused: Counter[str | None] = Counter()
    encode = Encoder(tokenizer, keys)
    with ExampleWriter() as writer:
        for number, record in read_records(path):
            try:
                if isinstance(record, BadLine):
                    raise record
                encoded = encode(record)
                ids, counted = encoded.ids, encoded.counted
                if vocab_size is not None and (problem := outside(ids, vocab_size)) is not None:
                    raise BadLine(problem)
                if not any(counted[1:]):
                    raise BadLine(f"{len(ids)} tokens and none of them with loss; at least 2 are needed")
            except BadLine as bad:
                problems.add(f"{path}:{number}: {bad}")
                continue
            unused.update(key if key in unused or len(unused) < _SHOWN else None for key in encoded.unused)
            if encoded.lost:
                lost = lost.plus(number, encoded.lost)
            if not encoded.ends:
                endless = endless.plus(number)
            if len(ids) > max_length:
                if not any(counted[1:max_length]):
                    dropped = dropped.plus(number)
                    continue
                truncated = truncated.plus(number)
            writer.add(ids[:max_length], counted[:max_length], number)
        examples = writer.examples()
    problems.check(f"{path} has {problems.count} bad lines")
    if dropped and not examples:
        raise DataError("no data", [f"{path}: no example has a token with loss within max_length = {max_length}"])
    if not examples:
        raise DataError("no data", [f"{path}: no examples, {EXPECTED} on each line"])
    return TokenData(path, examples, truncated, dropped, dict(unused), lost, endless, max_length)


class Problems:
    """What is wrong with a file: all of it counted, the first of it kept."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []

    def add(self, problem: str) -> None:
        self.count += 1
        if self.count <= _SHOWN:
            self._first.append(problem)

    def check(self, what: str) -> None:
        """Raises DataError if there was any."""
        if self.count > _SHOWN:
            raise DataError(what, [*self._first, f"and {self.count - _SHOWN:,} more"])
        if self.count:
            raise DataError(what, self._first)


def check_vocabulary(data: TokenData, model: Any) -> None:
    """Raises DataError for token ids that the model has no row for; data may have been read without a model."""
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocab_size is None:
        return
    problems = Problems()
    for example in data.examples:
        if (problem := outside(example.ids, vocab_size)) is not None:
            problems.add(f"{data.file}:{example.line}: {problem}")
    problems.check("the data are not for this model")


def split_data(data: TokenData, fraction: float, seed: int) -> tuple[TokenData, TokenData]:
    """Splits off round(fraction * n) examples, at least one, for evaluation; the same ones for the same seed.

    Raises:
        DataError: too few examples to leave one on each side.
    """
    n = len(data.examples)
    held_out = max(1, round(fraction * n))
    if held_out >= n:
        problem = f"{data.file}: {n} examples, of which eval_fraction {fraction} takes {held_out}"
        raise DataError("cannot split the data", [problem])
    chosen = np.zeros(n, bool)
    chosen[np.random.default_rng(seed).permutation(n)[:held_out]] = True
    examples = Examples.of(data.examples)
    train, evaluation = examples.take(~chosen), examples.take(chosen)
    return replace(data, examples=train), TokenData(data.file, evaluation, max_length=data.max_length)


def split_by(data: TokenData, key: str) -> dict[str, TokenData]:
    """The examples by the value that their lines in the file have at `key`; "all" where there is none."""
    examples = Examples.of(data.examples)
    order = np.argsort(examples.lines, kind="stable")
    found: dict[str, array[int]] = {}
    done = 0
    for number, record in read_records(data.file):
        while done < len(order) and examples.lines[order[done]] == number:
            value = record.get(key) if isinstance(record, dict) else None
            found.setdefault("all" if value is None else str(value), array("q")).append(order[done])
            done += 1
    if done < len(order):
        problem = f"{data.file}: line {examples.lines[order[done]]} is not there any more"
        raise DataError("the data are not those of the file", [problem])
    return {
        value: TokenData(data.file, examples.take(np.frombuffer(chosen, np.int64)), max_length=data.max_length)
        for value, chosen in found.items()
    }
