"""Files on disk: JSON and safetensors, read and written strictly. Failures are CheckpointErrors."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors needs to read it
import numpy as np
from safetensors import SafetensorError, safe_open

from interop.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DTYPES = tuple(_DTYPE_NAMES.values())


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

    try:
        data = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique, parse_constant=no_constant)
    except FileNotFoundError:
        raise CheckpointError("not a checkpoint", [f"{path}: missing file"]) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("unreadable JSON", [f"{path}: {error}"]) from error
    if not isinstance(data, dict):
        raise CheckpointError("unreadable JSON", [f"{path}: found {type(data).__name__}, expected an object"])
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"duplicate keys {[k for k in found if keys.count(k) > 1][:5]}")
    return found


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError("not a checkpoint", [f"{path}: missing file"]) from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError("unreadable safetensors file", [f"{path}: {error}"]) from error


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """({name: dtype and shape}, metadata) without reading any tensor."""
    _refuse_duplicates(path)
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
        infos = {name: TensorInfo(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
        return infos, dict(file.metadata() or {})


def _refuse_duplicates(path: Path) -> None:
    """The library keeps one of two entries of one name in silence. Everything else in the header it checks itself."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= min(os.path.getsize(path), 100_000_000) else b""
        json.loads(text or b"{}", object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointError("not a checkpoint", [f"{path}: missing file"]) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("unreadable safetensors file", [f"{path}: header: {error}"]) from error


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file; only floating-point dtypes of adapters are accepted."""
    infos, _ = read_header(path)
    wrong = [
        f"{n}: dtype {i.dtype}, expected one of {', '.join(DTYPES)}" for n, i in infos.items() if i.dtype not in DTYPES
    ]
    if wrong:
        raise CheckpointError(f"unsupported tensors in {path}", wrong)
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in infos}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file: the same bytes for the same content, one tensor in memory at a time.

    Not `safetensors.numpy.save_file`: it writes wrong values for views, its metadata come in random order, and it holds
    the whole file in memory.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    names, end = sorted(tensors, key=lambda n: (-tensors[n].itemsize, n)), 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = np.ascontiguousarray(tensors[name]).reshape(-1)
            little = tensor.astype(tensor.dtype.newbyteorder("<")) if tensor.dtype.byteorder == ">" else tensor
            file.write(little.view(np.uint8).data)
