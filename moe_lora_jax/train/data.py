"""From a JSONL file to token sequences. Every bad line is named; nothing is cut or dropped without a word."""

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_lora_jax.train.errors import DataError
from moe_lora_jax.train.records import EXPECTED, BadLine, Encoder, parse


@dataclass(frozen=True)
class Example:
    """One sequence. ids: [seq] int32. counted: [seq] bool, true for targets. line: its number in the file, from 1."""

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
    """

    file: Path
    examples: tuple[Example, ...]
    truncated: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()

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
        return text


def read_data(
    path: str | os.PathLike[str], tokenizer: Any, *, max_length: int, vocab_size: int | None = None
) -> TokenData:
    """Reads and tokenizes a JSONL file.

    Args:
        path: UTF-8, one object per line, in the forms of `records`; blank lines are skipped.
        tokenizer: from `load_tokenizer`.
        max_length: longer sequences are cut on the right; at least 2.
        vocab_size: of the model; a larger token id is an error.

    Raises:
        DataError: the file is missing, empty or has bad lines: every one is listed.
    """
    path = Path(path)
    examples: list[Example] = []
    problems: list[str] = []
    truncated: list[int] = []
    dropped: list[int] = []
    encode = Encoder(tokenizer)
    for number, raw in enumerate(_read_lines(path), start=1):
        if not raw.strip():
            continue
        try:
            ids, counted = encode(parse(raw))
        except BadLine as bad:
            problems.append(f"{path}:{number}: {bad}")
            continue
        if vocab_size is not None and max(ids, default=0) >= vocab_size:
            problems.append(f"{path}:{number}: token id {max(ids)}, the model's vocabulary has {vocab_size}")
            continue
        if not any(counted[1:]):
            problems.append(f"{path}:{number}: {len(ids)} tokens and none of them with loss; at least 2 are needed")
            continue
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
    return TokenData(path, tuple(examples), tuple(truncated), tuple(dropped))


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
    return TokenData(data.file, train, data.truncated, data.dropped), TokenData(data.file, evaluation)


def split_by(data: TokenData, key: str) -> dict[str, TokenData]:
    """The examples by the value that their lines in the file have at `key`; "all" where there is none."""
    lines = _read_lines(data.file)
    found: dict[str, list[Example]] = {}
    for example in sorted(data.examples, key=lambda e: e.line):
        found.setdefault(str(json.loads(lines[example.line - 1]).get(key, "all")), []).append(example)
    return {value: TokenData(data.file, tuple(examples)) for value, examples in found.items()}


def _read_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise DataError("cannot read the data", [f"{path}: {error.strerror}"]) from error


def _lines(numbers: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return f"lines {shown}{', ...' if len(numbers) > 5 else ''}"
