"""From a file to records: JSONL, a JSON array of objects, either of them gzipped, or parquet."""

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
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
_ROWS = 1000  # of a parquet file that are in memory at a time
_ENDINGS = {".csv": "a CSV file", ".tsv": "a TSV file", ".txt": "a text file", ".yaml": "a YAML file"}


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    """(number, record or what is wrong with it): the number of the line, of the array's element or of the row, from 1.

    One line, or a batch of rows, is in memory at a time; a JSON array, and gzipped parquet, wholly.

    Raises:
        DataError: the file cannot be read, or is of another format.
    """
    try:
        with path.open("rb") as file:
            if file.peek(2).startswith(b"\x1f\x8b"):
                with gzip.open(file) as unpacked:
                    yield from _records(path, unpacked)
            else:
                yield from _records(path, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError("cannot read the data", [f"{path}: broken gzip file: {error}"]) from error
    except OSError as error:
        raise DataError("cannot read the data", [f"{path}: {error.strerror}"]) from error


def _records(path: Path, file: io.BufferedReader | gzip.GzipFile) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    start = file.peek(64)
    other = next((what for first, what in _OTHERS.items() if start.startswith(first)), None)
    if other is None and start.startswith(b"PAR1"):
        yield from _rows(path, file)
        return
    begin = _begin(file) if other is None else []
    text = [line.strip() for line in begin if line.strip()]
    if other is None and not (text and text[0].startswith((b"{", b"["))):
        name = path.with_suffix("") if path.suffix == ".gz" else path
        other = _ENDINGS.get(name.suffix.lower())
    if other is not None:
        raise DataError("cannot read the data", [f"{path}: found {other}, {FORMATS}"])
    if text:
        begin[0] = begin[0].removeprefix(b"\xef\xbb\xbf")
        text[0] = text[0].removeprefix(b"\xef\xbb\xbf")
    lines = itertools.chain(begin, file)
    if _is_jsonl(text):
        yield from _lines(lines)
        return
    raw = b"".join(lines)
    array = _array(path, raw, alone=len(text) == 1)
    yield from _lines([raw]) if array is None else enumerate(map(_checked, array), start=1)


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


def _lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    """Of chunks that each end where a line ends."""
    lines = itertools.chain.from_iterable(chunk.splitlines() for chunk in chunks)  # \r alone ends a line, too
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, parse(line)
            except BadLine as bad:
                yield number, bad


def _begin(file: Iterable[bytes]) -> list[bytes]:
    """The lines up to the second one with text."""
    begin: list[bytes] = []
    with_text = 0
    for line in file:
        begin.append(line)
        with_text += bool(line.strip())
        if with_text == 2:
            break
    return begin


def _is_jsonl(text: list[bytes]) -> bool:
    """By the first two lines with text: a file with a value on each line. False: it may be one value, an array."""
    if not text or not text[0].startswith((b"[", b"{")):
        return True
    if len(text) == 1:
        return False
    first, second = text
    return _is_json(first) or first.startswith(b"{") and second.startswith(b"{") and _is_json(second)


def _array(path: Path, raw: bytes, *, alone: bool) -> list[Any] | None:
    """The elements, if the file is one JSON array; None if it has a value on each line.

    Args:
        alone: it is a single line.

    Raises:
        DataError: it is one JSON value over several lines, but no array, or not JSON.
    """
    text = raw.strip()
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


def _rows(path: Path, file: io.BufferedReader | gzip.GzipFile) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        hint = "parquet needs pyarrow: pip install 'moe-lora-jax[data]'"
        raise DataError("cannot read the data", [f"{path}: {hint}"]) from error
    try:
        is_plain = isinstance(file, io.BufferedReader) and file.seekable()
        source = pyarrow.parquet.ParquetFile(file if is_plain else pyarrow.BufferReader(file.read()))
        rows = (row for batch in source.iter_batches(_ROWS) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield number, _without_nulls(row)
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # a date too far
        raise DataError("cannot read the data", [f"{path}: not parquet that can be read: {error}"]) from error


def _without_nulls(value: Any) -> Any:
    """A column of structs gives each of them the keys of all: null is absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
