"""Files on disk: JSON and safetensors, read and written strictly. Failures are CheckpointErrors."""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from xxhash import xxh3_128

from moe_lora_interop.disk import digest, lazy, limits
from moe_lora_interop.disk.digest import NAME as DIGEST
from moe_lora_interop.disk.dtypes import NUMPY, STORED
from moe_lora_interop.disk.lazy import Lazy, Tensor
from moe_lora_interop.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_LFS = b"version https://git-lfs.github.com/spec/"


class TensorInfo(NamedTuple):
    """A tensor's entry in a safetensors header: dtype ("F32", "BF16", ...) and shape."""

    dtype: str
    shape: tuple[int, ...]


def existing_directory(path: str | os.PathLike[str]) -> Path:
    """The path, if it is a directory that can be read."""
    directory = Path(path)
    try:
        found = "a file" if directory.is_file() else "" if directory.is_dir() else "nothing"
    except (OSError, ValueError) as error:
        found = str(error)
    if found:
        raise CheckpointError("not a checkpoint", [f"{directory}: found {found}, expected a directory"])
    return directory


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file: UTF-8, no duplicate keys, no NaN."""

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    with opened(path, "JSON") as file:
        size = min(os.fstat(file.fileno()).st_size, limits.JSON_BYTES)
        try:
            data = limits.parsed_json(file.read(size + 1), parse_constant=no_constant)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError("unreadable JSON", [f"{path}: {error}"]) from error
    if not isinstance(data, dict):
        raise CheckpointError("unreadable JSON", [f"{path}: found {type(data).__name__}, expected an object"])
    return data


class TensorFile:
    """A safetensors file, opened; its header is parsed once. A context manager.

    Attributes:
        infos: {name: dtype and shape}.
        metadata: of the header.
    """

    def __init__(self, path: Path):
        """Raises CheckpointError: unreadable."""
        self._path, self._file = path, opened(path, "safetensors file")
        try:
            header, self._start = _parsed_header(path, self._file)
        except BaseException:
            self._file.close()
            raise
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.infos = {name: TensorInfo(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        self._offsets = {name: entry["data_offsets"][0] for name, entry in header.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def tensors(self) -> dict[str, Lazy]:
        """Every tensor, each read when it is asked for (`disk.lazy`), while the file is open.

        Raises:
            CheckpointError: a tensor's dtype is not one of adapters. Reading a tensor may raise it, too.
        """
        wrong = [
            f"{name}: dtype {info.dtype}, expected one of {', '.join(NUMPY)}"
            for name, info in self.infos.items()
            if info.dtype not in NUMPY
        ]
        if wrong:
            raise CheckpointError(f"unsupported tensors in {self._path}", wrong)
        return {
            name: _on_disk(self._file, self._start + self._offsets[name], np.dtype(NUMPY[info.dtype]), info.shape)
            for name, info in self.infos.items()
        }


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """({name: dtype and shape}, metadata) without reading any tensor."""
    with TensorFile(path) as file:
        return file.infos, file.metadata


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file; only floating-point dtypes of adapters are accepted."""
    with TensorFile(path) as file:
        return {name: np.asarray(tensor) for name, tensor in file.tensors().items()}


def opened(path: Path, what: str) -> BinaryIO:
    """A regular file, opened: not a pipe, which would be waited for, nor a device, which may have no end."""
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except FileNotFoundError:
        raise CheckpointError("not a checkpoint", [f"{path}: missing file", *shards_of(path)]) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"unreadable {what}", [f"{path}: {error}"]) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"unreadable {what}", [f"{path}: found a pipe or device, expected a regular file"])
    if file.read(len(_LFS)) == _LFS:
        file.close()
        problem = "found a Git LFS pointer, not the file itself: run git lfs pull where it was cloned"
        raise CheckpointError(f"unreadable {what}", [f"{path}: {problem}"])
    file.seek(0)
    return file


def shards_of(path: Path) -> list[str]:
    """What to do where a file is missing, but its parts are there: one line, or none."""
    parts = sorted(p.name for p in path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"))
    index = path.with_name(f"{path.name}.index.json")
    if not parts and not index.exists():
        return []
    found = f"{parts[0]} and {len(parts) - 1} more" if parts[1:] else parts[0] if parts else index.name
    return [f"found {found}: these are parts (shards) of {path.name}, which is read as one file; join them first"]


def _parsed_header(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header as it is written, and where the data begin. The library checks it; only that it keeps one of two
    entries of one name in silence is left to us."""
    try:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, limits.JSON_BYTES + 1)) if length <= os.fstat(file.fileno()).st_size else b""
        header = limits.parsed_json(text or b"{}")
        with safe_open(path, framework="numpy"):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return header, 8 + length
            raise ValueError("the file was replaced while it was being opened")
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError("unreadable safetensors file", [f"{path}: {error}"]) from error


def _on_disk(file: BinaryIO, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> Lazy:
    """A tensor whose bytes begin at `start`."""

    def read() -> np.ndarray:
        data = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        try:
            file.seek(start)
            found = file.readinto(data)  # type: ignore[attr-defined]
        except OSError as error:
            raise CheckpointError("unreadable safetensors file", [f"{file.name}: {error}"]) from error
        if found != data.size:
            problem = f"{file.name}: found {found} bytes at {start}, expected {data.size}: the file has become shorter"
            raise CheckpointError("unreadable safetensors file", [problem])
        return data.view(dtype).reshape(shape)

    each = math.prod(shape[1:]) * dtype.itemsize
    return Lazy(dtype, shape, read, lambda i: _on_disk(file, start + i * each, dtype, shape[1:]))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], state: xxh3_128 | None = None
) -> None:
    """Writes a safetensors file: the same bytes for the same content, one tensor in memory at a time.

    Not `safetensors.numpy.save_file`: it writes wrong values for views, its metadata come in random order, and it holds
    the whole file in memory.

    Args:
        state: a digest's state before the tensors (`disk.digest`); the finished digest goes into the metadata.
    """
    write_in_order(path, dict(sorted(tensors.items())), metadata, state)


def write_in_order(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], state: xxh3_128 | None = None
) -> None:
    """`write_tensors` in the order given, but wider dtypes first, so that values stay aligned."""
    entries: dict[str, Any] = {}
    end = 0
    for name in sorted(tensors, key=lambda n: -tensors[n].itemsize):
        tensor, start = tensors[name], end
        end += tensor.nbytes
        entries[name] = {"dtype": STORED[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [start, end]}
    state = state.copy() if state is not None else None
    start = len(_header(entries, metadata, state))
    with path.open("wb") as file:
        for name, tensor in tensors.items():  # the digest's order, where there is one
            data = lazy.raw(tensor)
            assert len(data) == tensor.nbytes, name
            file.seek(start + entries[name]["data_offsets"][0])
            file.write(data)
            if state is not None:
                state.update(data)
        file.seek(0)
        file.write(_header(entries, metadata, state))


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str], state: xxh3_128 | None) -> bytes:
    """The header with its length in front; as long before the digest is finished as after."""
    signed = {**metadata, DIGEST: digest.text(state)} if state is not None else metadata
    text = json.dumps({"__metadata__": dict(sorted(signed.items())), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
