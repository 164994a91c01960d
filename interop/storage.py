"""A directory in any layout, as one config and one flat set of tensors; folders become part of a tensor's name.

With `Folders`, a tensor of the main file is `main/NAME`, of expert e's folder `e/NAME`, of the sidecar `sidecar/NAME`;
the experts' configs are the list `experts` of the main config, their number its `num_experts`.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interop import files, torch_files
from interop.dialect import Dialect, Folders, lookup
from interop.errors import CheckpointError
from interop.files import TensorInfo

Loader = Callable[[], np.ndarray]
BIN_NAME = "adapter_model.bin"
NPZ_NAME = "adapter_model.npz"


class Stored:
    """What a directory holds: `raw` config, `infos` {name: dtype and shape}, and `tensors()`."""

    def __init__(self, raw: dict[str, Any], parts: Mapping[str, Path]):
        self.raw = raw
        self._parts = {prefix: path for prefix, path in parts.items() if path is not None}
        self._binary: dict[str, dict[str, np.ndarray]] = {}
        self.infos: dict[str, TensorInfo] = {}
        for prefix, path in self._parts.items():
            if path.suffix == ".safetensors":
                found = files.read_header(path)[0]
            else:
                self._binary[prefix] = read_npz(path) if path.suffix == ".npz" else torch_files.read(path)
                found = {n: TensorInfo(t.dtype.name, t.shape) for n, t in self._binary[prefix].items()}
            self.infos.update({prefix + name: info for name, info in found.items()})

    def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor, by its flat name."""
        return {
            prefix + name: tensor
            for prefix, path in self._parts.items()
            for name, tensor in (self._binary.get(prefix) or files.read_tensors(path)).items()
        }


def open_directory(directory: Path, dialect: Dialect | None, options: Mapping[str, Any]) -> Stored:
    """Opens a directory in layout `dialect` (None: any with all tensors in one file).

    Raises:
        CheckpointError: not a checkpoint, or a part of it is missing or unreadable.
    """
    folders = dialect.folders if dialect is not None else None
    if folders is not None:
        return _open_folders(directory, folders, options)
    with_config = dialect is not None and dialect.config_file
    has_config = (directory / files.CONFIG_NAME).exists()
    raw = files.read_json(directory / files.CONFIG_NAME) if with_config or has_config else {}
    return Stored(raw, {"": weights_path(directory)})


def weights_path(directory: Path) -> Path:
    """The weights file that is there; safetensors before .bin before .npz."""
    names = (files.WEIGHTS_NAME, BIN_NAME, NPZ_NAME)
    found = next((directory / n for n in names if (directory / n).exists()), None)
    if found is None:
        raise CheckpointError("not a checkpoint", [f"{directory}: missing file, expected one of {', '.join(names)}"])
    return found


def folders_in(directory: Path, folders: Folders) -> dict[str, Path] | None:
    """{expert number: folder} as the main config names them; None if there is no such config."""
    main = directory / folders.main / files.CONFIG_NAME
    if not main.is_file():
        return None
    listed = lookup(files.read_json(main), folders.listed_in, None)
    if isinstance(listed, Mapping):
        named = {str(n): path for n, path in listed.items()}
    elif isinstance(listed, list):
        named = {str(n): path for n, path in enumerate(listed)}
    else:
        return None
    wrong = [f"{n}: {p!r}" for n, p in named.items() if not isinstance(p, str) or os.path.isabs(p) or "\0" in p]
    if wrong or sorted(named, key=lambda n: (len(n), n)) != [str(n) for n in range(len(named))]:
        problem = f"{folders.listed_in}: found {listed!r}, expected relative folders numbered from 0"
        raise CheckpointError(f"{main} does not name its experts", [problem])
    return {n: directory / path for n, path in named.items()}


def _open_folders(directory: Path, folders: Folders, options: Mapping[str, Any]) -> Stored:
    found = folders_in(directory, folders)
    if found is None:
        problem = f"{directory / folders.main / files.CONFIG_NAME}: no {folders.listed_in} that names the experts"
        raise CheckpointError("not a checkpoint", [problem])
    main = directory / folders.main
    raw = files.read_json(main / files.CONFIG_NAME)
    parts = {"main/": main / files.WEIGHTS_NAME} if (main / files.WEIGHTS_NAME).exists() else {}
    missing = [f"expert {n}: {path} is no directory" for n, path in found.items() if not path.is_dir()]
    if missing:
        raise CheckpointError("experts are missing", missing)
    raw["experts"] = [files.read_json(path / files.CONFIG_NAME) for path in found.values()]
    raw["num_experts"] = len(found)
    parts |= {f"{n}/": path / files.WEIGHTS_NAME for n, path in found.items()}
    if folders.sidecar:
        given = options.get(Path(folders.sidecar).stem)
        sidecar = Path(given) if given is not None else directory / folders.sidecar
        if given is not None or sidecar.exists():
            parts["sidecar/"] = sidecar
    return Stored(raw, parts)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; no pickles."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise CheckpointError("missing file", [f"{path}: does not exist"]) from None
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError("unreadable .npz file", [f"{path}: {error}"]) from error


def store(
    directory: Path,
    dialect: Dialect,
    raw: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    metadata: dict[str, str],
) -> dict[str, Callable[[Path], None]]:
    """{relative file name: function that writes it} for a directory in layout `dialect`."""
    folders = dialect.folders
    if folders is None:
        config = {files.CONFIG_NAME: _json_writer(raw)} if dialect.config_file else {}
        return {**config, dialect.weights: _tensor_writer(tensors, metadata, dialect.weights)}
    writers: dict[str, Callable[[Path], None]] = {}
    main = {k: v for k, v in raw.items() if k not in ("experts", "num_experts")}
    names = [folders.name.format(expert=n) for n in range(raw["num_experts"])]
    is_object = "." not in folders.listed_in
    _put(main, folders.listed_in, {str(n): name for n, name in enumerate(names)} if is_object else names)
    for n, name in enumerate(names):
        of_expert = {**raw["experts"][n], "peft_type": "LORA", "bias": "none"}
        of_expert |= {k: raw[k] for k in ("base_model_name_or_path", "task_type") if k in raw}
        writers[f"{name}/{files.CONFIG_NAME}"] = _json_writer(of_expert)
        writers[f"{name}/{files.WEIGHTS_NAME}"] = _tensor_writer(_under(tensors, f"{n}/"), metadata)
    prefix = f"{folders.main}/" if folders.main else ""
    if folders.sidecar and (sidecar := _under(tensors, "sidecar/")):
        writers[folders.sidecar] = lambda path: np.savez(path, allow_pickle=False, **sidecar)
    if top := _under(tensors, "main/"):
        writers[f"{prefix}{files.WEIGHTS_NAME}"] = _tensor_writer(top, metadata)
    writers[f"{prefix}{files.CONFIG_NAME}"] = _json_writer(main)
    return writers


def _under(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _put(raw: dict[str, Any], path: str, value: Any) -> None:
    head, _, rest = path.partition(".")
    if rest:
        raw[head] = dict(raw.get(head, {}))
        _put(raw[head], rest, value)
    else:
        raw[head] = value


def _json_writer(data: Mapping[str, Any]) -> Callable[[Path], None]:
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"

    def write(path: Path) -> None:
        path.write_text(text, "utf-8")

    return write


def _tensor_writer(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], name: str = files.WEIGHTS_NAME
) -> Callable[[Path], None]:
    if name.endswith(".bin"):
        return lambda path: torch_files.write(path, tensors)
    return lambda path: files.write_tensors(path, tensors, metadata)
