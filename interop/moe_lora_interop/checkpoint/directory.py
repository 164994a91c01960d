"""A directory in any layout, as one config and one flat set of tensors; folders become part of a tensor's name.

With `Folders`, a tensor of the main file is `main/NAME`, of expert e's folder `e/NAME`, of the sidecar `sidecar/NAME`;
the experts' configs are the list `experts` of the main config, their number its `num_experts`.
"""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128

from moe_lora_interop.disk import files, lazy, limits, torch_files
from moe_lora_interop.disk.files import TensorInfo
from moe_lora_interop.disk.npz import read_npz, write_npz
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.rules.dialect import Dialect, Folders, lookup

BIN_NAME = "adapter_model.bin"
NPZ_NAME = "adapter_model.npz"


class Stored:
    """What a directory holds: `raw` config, `infos` {name: dtype and shape}, `metadata`, and `tensors(...)`."""

    def __init__(self, raw: dict[str, Any], parts: Mapping[str, Path]):
        self.raw = raw
        self._parts = dict(parts)
        self._binary: dict[str, dict[str, np.ndarray]] = {}
        self.infos: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        for prefix, path in self._parts.items():
            if path.suffix == ".safetensors":
                found, self.metadata = files.read_header(path)
            else:
                self._binary[prefix] = read_npz(path) if path.suffix == ".npz" else torch_files.read(path)
                found = {n: TensorInfo(t.dtype.name, t.shape) for n, t in self._binary[prefix].items()}
            self.infos.update({prefix + name: info for name, info in found.items()})
        if absurd := limits.tensor_problems((name, info.shape) for name, info in self.infos.items()):
            raise CheckpointError("unreadable tensors", absurd)

    def tensors(self, sources: ExitStack) -> dict[str, np.ndarray]:
        """Every tensor by its flat name; those of .safetensors are read when asked for, while `sources` is open."""
        found: dict[str, np.ndarray] = {}
        for prefix, path in self._parts.items():
            if prefix in self._binary:
                of_part = {name: lazy.in_memory(array) for name, array in self._binary[prefix].items()}
            else:
                of_part = sources.enter_context(files.open_tensors(path))
            found |= {prefix + name: tensor for name, tensor in of_part.items()}
        return found


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
        problems = [f"{directory}: missing file, expected one of {', '.join(names)}"]
        problems += [line for name in names for line in files.shards_of(directory / name)]
        if not (directory / files.CONFIG_NAME).exists():
            problems.append(f"{directory / files.CONFIG_NAME}: missing file")
        if (directory / "config.json").is_file():
            problems.append(f"{directory} is a model's directory, expected an adapter's")
        raise CheckpointError("not a checkpoint", problems)
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
    wrong = len(named) > limits.FOLDERS or any(
        not isinstance(p, str) or os.path.isabs(p) or not p.isprintable() for p in named.values()
    )
    if wrong or sorted(named, key=lambda n: (len(n), n)) != [str(n) for n in range(len(named))]:
        problem = (
            f"{folders.listed_in}: found {listed!r}, expected at most {limits.FOLDERS} relative folders numbered from 0"
        )
        raise CheckpointError(f"{main} does not name its experts", [problem])
    places = {os.path.realpath(directory / path) for path in named.values()}
    inside = os.path.join(os.path.realpath(directory), "")
    if len(places) < len(named) or not (folders.outside or all(place.startswith(inside) for place in places)):
        where = "" if folders.outside else f" inside {directory}"
        problem = f"{folders.listed_in}: found {listed!r}, expected different folders{where}"
        raise CheckpointError(f"{main} does not name its experts", [problem])
    return {n: directory / path for n, path in named.items()}


def names_in_folders(directory: Path, folders: Folders) -> list[str]:
    """The files of a checkpoint with this kind of folders, as `store` names them; none if there is no main config."""
    if not (directory / folders.main / files.CONFIG_NAME).is_file():
        return []
    try:
        experts = folders_in(directory, folders)
    except CheckpointError:
        experts = None
    if experts is None and not folders.main:
        return []  # the config of another layout
    named = (folders.name.format(expert=n) for n in experts or ())
    ours = [name for name, path in zip(named, (experts or {}).values(), strict=True) if path == directory / name]
    found = [
        str(Path(part, name)) for part in (folders.main, *ours) for name in (files.CONFIG_NAME, files.WEIGHTS_NAME)
    ]
    return [*found, *([folders.sidecar] if folders.sidecar else [])]


def _open_folders(directory: Path, folders: Folders, options: Mapping[str, Any]) -> Stored:
    found = folders_in(directory, folders)
    if found is None:
        problem = f"{directory / folders.main / files.CONFIG_NAME}: no {folders.listed_in} that names the experts"
        raise CheckpointError("not a checkpoint", [problem])
    main = directory / folders.main
    raw = files.read_json(main / files.CONFIG_NAME)
    parts = {"main/": main / files.WEIGHTS_NAME} if (main / files.WEIGHTS_NAME).exists() else {}
    missing = [f"expert {n}: {path} is no directory" for n, path in found.items() if not os.path.isdir(path)]
    if missing:
        raise CheckpointError("experts are missing", missing)
    raw["experts"] = [files.read_json(path / files.CONFIG_NAME) for path in found.values()]
    raw["num_experts"] = len(found)
    parts |= {f"{n}/": path / files.WEIGHTS_NAME for n, path in found.items()}
    if folders.sidecar:
        given = options.get(Path(folders.sidecar).stem)
        sidecar = Path(given) if given is not None else directory / folders.sidecar
        if given is not None or os.path.lexists(sidecar):
            parts["sidecar/"] = sidecar
    return Stored(raw, parts)


def store(
    directory: Path,
    dialect: Dialect,
    raw: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    metadata: dict[str, str],
    state: xxh3_128 | None = None,
) -> dict[str, Callable[[Path], None]]:
    """{relative file name: function that writes it} for a directory in layout `dialect`; `state` as in `files`."""
    folders = dialect.folders
    if folders is None:
        config = {files.CONFIG_NAME: _json_writer(raw)} if dialect.config_file else {}
        return {**config, dialect.weights: _tensor_writer(tensors, metadata, dialect.weights, state)}
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
        writers[folders.sidecar] = lambda path: write_npz(path, sidecar)
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
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    name: str = files.WEIGHTS_NAME,
    state: xxh3_128 | None = None,
) -> Callable[[Path], None]:
    if name.endswith(".bin"):
        return lambda path: torch_files.write(path, tensors)
    return lambda path: files.write_tensors(path, tensors, metadata, state)
