"""Limits on what is read: far beyond any real adapter; without them a small file could cost any memory or time."""

import json
import math
import zipfile
from collections import Counter
from collections.abc import Iterable
from typing import Any

JSON_BYTES = 2**24  # also of a safetensors header
JSON_VALUES = 2**18  # about 30,000 tensors
JSON_DEPTH = 64
JSON_DIGITS = 20  # of an integer
NAME_LENGTH = 1024  # of a tensor
TENSOR_VALUES = 2**48
FOLDERS = 1024  # of experts
MATCH_SECONDS = 0.5  # for one regular expression of a config on one module's path


def parsed_json(text: bytes, **hooks: Any) -> Any:
    """JSON in UTF-8, without duplicate keys.

    Raises:
        ValueError: it is not, or it is too long, has too many values, or is nested too deeply.
        RecursionError: likewise.
    """
    values = sum(map(text.count, (b",", b"[", b"{")))
    if len(text) > JSON_BYTES or values > JSON_VALUES:
        found = f"{len(text)} bytes and about {values} values"
        raise ValueError(f"found {found}, expected at most {JSON_BYTES} and {JSON_VALUES}")
    data = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer, **hooks)
    level = [data]
    for _ in range(JSON_DEPTH):
        level = [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]
    if level:
        raise ValueError(f"nested more than {JSON_DEPTH} levels deep")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"duplicate keys {[k for k, n in Counter(k for k, _ in pairs).items() if n > 1][:5]}")
    return found


def _integer(text: str) -> int:
    if len(text) > JSON_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits, expected at most {JSON_DIGITS}")
    return int(text)


def tensor_problems(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> list[str]:
    """Tensors whose name or shape is absurd: patterns would take long on the name, and numpy refuses the shape."""
    return [
        f"{name[:100]!r}{' ...' * (len(name) > 100)} {list(shape)}: a name of {len(name)} characters, expected at most "
        f"{NAME_LENGTH}, and a shape of less than {TENSOR_VALUES} values"
        for name, shape in shapes
        if len(name) > NAME_LENGTH or math.prod(max(size, 1) for size in shape) >= TENSOR_VALUES
    ]


def check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Raises ValueError if a file of `size` bytes unpacks to far more."""
    unpacked = sum(member.file_size for member in archive.infolist())
    if is_inflated(unpacked, size):
        raise ValueError(f"{size} bytes that unpack to {unpacked}")


def is_inflated(in_memory: int, on_disk: int) -> bool:
    """Whether data of `on_disk` bytes become too many bytes in memory: unpacked, repeated or padded."""
    return in_memory > 16 * on_disk + 2**18
