"""From a file to records: JSONL, a JSON array of objects, either of them gzipped, or parquet."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_lora_jax.train.errors import BadLine, DataError

FORMATS = "expected JSONL, a JSON array of objects, either of them gzipped, or parquet"
_OTHERS = {  # how files of other formats begin
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\xfd7zXZ\x00": "an xz file",
    b"BZh": "a bzip2 file",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "an SQLite database",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}
_ENDINGS = {".csv": "a CSV file", ".tsv": "a TSV file", ".txt": "a text file", ".yaml": "a YAML file"}


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    """(number, record or what is wrong with it): the number of the line, of the array's element or of the row, from 1.

    Raises:
        DataError: the file cannot be read, or is of another format.
    """
    try:
        raw = path.read_bytes()
        if raw.startswith(b"\x1f\x8b"):
            raw = gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError("cannot read the data", [f"{path}: broken gzip file: {error}"]) from error
    except OSError as error:
        raise DataError("cannot read the data", [f"{path}: {error.strerror}"]) from error
    name = path.with_suffix("") if path.suffix == ".gz" else path
    other = next((what for start, what in _OTHERS.items() if raw.startswith(start)), None)
    if other is None and not raw.lstrip().startswith((b"{", b"[")):
        other = _ENDINGS.get(name.suffix.lower())
    if other is not None:
        raise DataError("cannot read the data", [f"{path}: found {other}, {FORMATS}"])
    if raw.startswith(b"PAR1"):
        return _rows(path, raw)
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    array = _array(path, raw)
    return _lines(raw) if array is None else enumerate(map(_checked, array), start=1)


def parse(raw: bytes) -> dict[str, Any]:
    """The object in a line, or BadLine."""
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadLine(f"not JSON that can be read: {reason}") from None
    found = _checked(record)
    if isinstance(found, BadLine):
        raise found
    return found


def _lines(raw: bytes) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    for number, line in enumerate(raw.splitlines(), start=1):
        if line.strip():
            try:
                yield number, parse(line)
            except BadLine as bad:
                yield number, bad


def _array(path: Path, raw: bytes) -> list[Any] | None:
    """The elements, if the file is one JSON array; None if it has a value on each line.

    Raises:
        DataError: it is one JSON value over several lines, but no array, or not JSON.
    """
    text = raw.strip()
    first = text.split(b"\n", 1)[0]
    alone = len(first) == len(text)
    if not text.startswith((b"[", b"{")) or not alone and _is_json(first):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is one too
        if text.startswith(b"[") and not alone:
            raise DataError("cannot read the data", [f"{path}: a JSON array that is not JSON: {error}"]) from None
        return None
    if isinstance(value, list) and (not alone or all(isinstance(element, dict) for element in value)):
        return value
    if isinstance(value, dict) and not alone:
        keys = ", ".join(sorted(value)[:5])
        raise DataError("cannot read the data", [f"{path}: found one JSON object ({keys}), {FORMATS}"])
    return None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _checked(value: Any) -> dict[str, Any] | BadLine:
    return value if isinstance(value, dict) else BadLine(f"found {type(value).__name__}, expected an object")


def _rows(path: Path, raw: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        hint = "parquet needs pyarrow: pip install 'moe-lora-jax[data]'"
        raise DataError("cannot read the data", [f"{path}: {hint}"]) from error
    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(raw)).to_pylist()
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # a date too far
        raise DataError("cannot read the data", [f"{path}: not parquet that can be read: {error}"]) from error
    return enumerate(map(_without_nulls, rows), start=1)


def _without_nulls(value: Any) -> Any:
    """A column of structs gives each of them the keys of all: null is absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
