"""From a data file to token sequences. Every bad line is named; nothing is cut or dropped without a word."""

import os
import zlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_lora_jax.models.vocabulary import outside
from moe_lora_jax.train.errors import BadLine, DataError
from moe_lora_jax.train.records import EXPECTED, Encoder
from moe_lora_jax.train.tables import read_records


@dataclass(frozen=True)
class Example:
    """One sequence. ids: [seq] int32. counted: [seq] bool, true for targets. line: its number in the file, from 1
    (in a JSON array that of the element, in parquet that of the row).
    """

    ids: np.ndarray
    counted: np.ndarray
    line: int


@dataclass(frozen=True)
class TokenData:
    """The examples of one file, and what the length limit did to them.

    Attributes:
        file: where they come from.
        examples: at least one; each counts at least one token.
        truncated: lines of the examples that were cut at max_length.
        dropped: lines left out because the cut took every counted token.
        unused: {key of a line that nothing reads: on how many lines}.
        lost: {line: turns of the assistant that carry no loss, because the template renders them differently later}.
        endless: lines whose last answer ends with no token of its own.
    """

    file: Path
    examples: tuple[Example, ...]
    truncated: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    unused: Mapping[str, int] = field(default_factory=dict)
    lost: Mapping[int, int] = field(default_factory=dict)
    endless: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(len(e.ids) for e in self.examples)

    @property
    def digest(self) -> str:
        """Checksum of all tokens and masks: whether a resumed run sees the same data."""
        total = 0
        for e in self.examples:
            total = zlib.crc32(e.counted.tobytes(), zlib.crc32(e.ids.tobytes(), total))
        return f"{len(self.examples)} examples, crc32 {total:08x}"

    def describe(self) -> str:
        """One line for people: how many examples and tokens, and what was cut."""
        tokens = sum(len(e.ids) for e in self.examples)
        counted = sum(int(e.counted[1:].sum()) for e in self.examples)
        text = f"{self.file}: {len(self.examples)} examples, {tokens} tokens ({counted} with loss)"
        if self.truncated:
            text += f"; {len(self.truncated)} cut at max_length ({_lines(self.truncated)})"
        if self.dropped:
            text += f"; {len(self.dropped)} left out, no token with loss within max_length ({_lines(self.dropped)})"
        if self.lost:
            text += (
                f"; {sum(self.lost.values()):,} earlier turns of the assistant carry no loss, because the chat "
                f"template renders them differently once more messages follow ({_lines(tuple(self.lost))}): mark them "
                "with {% generation %} in a template of your own (--chat-template)"
            )
        if self.endless:
            text += (
                f"; {len(self.endless):,} conversations end with no token with loss that ends an answer "
                f"({_lines(self.endless)}), so nothing teaches the model to stop: put one into the assistant's turn "
                "in a template of your own (--chat-template)"
            )
        for key, count in self.unused.items():
            text += f"; unused key {key!r} on {count:,} {'line' if count == 1 else 'lines'}"
        return text


def read_data(
    path: str | os.PathLike[str],
    tokenizer: Any,
    *,
    max_length: int,
    vocab_size: int | None = None,
    keys: Collection[str] = (),
) -> TokenData:
    """Reads and tokenizes a data file.

    Args:
        path: objects in the forms of `records`: one on each line (JSONL, UTF-8, blank lines are skipped), or a JSON
            array of them, either of them gzipped, or parquet.
        tokenizer: from `load_tokenizer`.
        max_length: longer sequences are cut on the right; at least 2.
        vocab_size: of the model; a larger token id is an error.
        keys: of the records that the caller reads itself (`split_by`).

    Raises:
        DataError: the file is missing, empty, in another format or has bad lines: every one is listed.
    """
    path = Path(path)
    examples: list[Example] = []
    problems: list[str] = []
    truncated: list[int] = []
    dropped: list[int] = []
    unused: Counter[str] = Counter()
    lost: dict[int, int] = {}
    endless: list[int] = []
    encode = Encoder(tokenizer, keys)
    for number, record in read_records(path):
        try:
            if isinstance(record, BadLine):
                raise record
            encoded = encode(record)
        except BadLine as bad:
            problems.append(f"{path}:{number}: {bad}")
            continue
        ids, counted = encoded.ids, encoded.counted
        unused.update(encoded.unused)
        problem = None if vocab_size is None else outside(ids, vocab_size)
        if problem is not None:
            problems.append(f"{path}:{number}: {problem}")
            continue
        if not any(counted[1:]):
            problems.append(f"{path}:{number}: {len(ids)} tokens and none of them with loss; at least 2 are needed")
            continue
        if encoded.lost:
            lost[number] = encoded.lost
        if not encoded.ends:
            endless.append(number)
        if len(ids) > max_length:
            kept = any(counted[1:max_length])
            (truncated if kept else dropped).append(number)
            if not kept:
                continue
        examples.append(Example(np.array(ids[:max_length], np.int32), np.array(counted[:max_length], bool), number))
    if problems:
        raise DataError(f"{path} has {len(problems)} bad lines", problems)
    if dropped and not examples:
        raise DataError("no data", [f"{path}: no example has a token with loss within max_length = {max_length}"])
    if not examples:
        raise DataError("no data", [f"{path}: no examples, {EXPECTED} on each line"])
    return TokenData(path, tuple(examples), tuple(truncated), tuple(dropped), dict(unused), lost, tuple(endless))


def check_vocabulary(data: TokenData, model: Any) -> None:
    """Raises DataError for token ids that the model has no row for; data may have been read without a model."""
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocab_size is None:
        return
    found = [(e.line, problem) for e in data.examples if (problem := outside(e.ids, vocab_size)) is not None]
    if found:
        raise DataError(
            "the data are not for this model", [f"{data.file}:{line}: {problem}" for line, problem in found]
        )


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
    chosen = set(np.random.default_rng(seed).permutation(n)[:held_out].tolist())
    train, evaluation = (
        tuple(e for i, e in enumerate(data.examples) if (i in chosen) == is_chosen) for is_chosen in (False, True)
    )
    return replace(data, examples=train), TokenData(data.file, evaluation)


def split_by(data: TokenData, key: str) -> dict[str, TokenData]:
    """The examples by the value that their lines in the file have at `key`; "all" where there is none."""
    records = {number: record for number, record in read_records(data.file) if isinstance(record, dict)}
    found: dict[str, list[Example]] = {}
    for example in sorted(data.examples, key=lambda e: e.line):
        value = records[example.line].get(key)
        found.setdefault("all" if value is None else str(value), []).append(example)
    return {value: TokenData(data.file, tuple(examples)) for value, examples in found.items()}


def _lines(numbers: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return f"lines {shown}{', ...' if len(numbers) > 5 else ''}"
