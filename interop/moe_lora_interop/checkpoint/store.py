"""Which files a checkpoint consists of, and the functions that write them: `directory` read from the other side."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from moe_lora_interop.checkpoint.directory import BIN_NAME, NPZ_NAME, Directory
from moe_lora_interop.disk import files, torch_files
from moe_lora_interop.disk.lazy import Tensor
from moe_lora_interop.disk.npz import write_npz
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.rules.dialect import Dialect, Folders


def store(
    dialect: Dialect,
    raw: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    state: xxh3_128 | None = None,
) -> dict[str, Callable[[Path], None]]:
    """{relative file name: function that writes it} for a directory in layout `dialect`; `state` as in `files`."""
    folders = dialect.folders
    if folders is None:
        config = {files.CONFIG_NAME: _json_writer(raw)} if dialect.config_file else {}
        return {**config, dialect.weights: _tensor_writer(tensors, dialect.header(raw), dialect.weights, state)}
    writers: dict[str, Callable[[Path], None]] = {}
    main = {k: v for k, v in raw.items() if k not in ("experts", "num_experts")}
    names = [folders.name.format(expert=n) for n in range(raw["num_experts"])]
    _put(main, folders.listed_in, {str(n): name for n, name in enumerate(names)} if folders.as_object else names)
    for n, name in enumerate(names):
        of_expert = {**raw["experts"][n], "peft_type": "LORA", "bias": "none"}
        of_expert |= {k: raw[k] for k in ("base_model_name_or_path", "task_type") if k in raw}
        writers[f"{name}/{files.CONFIG_NAME}"] = _json_writer(of_expert)
        writers[f"{name}/{files.WEIGHTS_NAME}"] = _tensor_writer(_under(tensors, f"{n}/"), dialect.header(raw))
    prefix = f"{folders.main}/" if folders.main else ""
    if folders.sidecar and (sidecar := _under(tensors, "sidecar/")):
        writers[folders.sidecar] = lambda path: write_npz(path, sidecar)
    if top := _under(tensors, "main/"):
        writers[f"{prefix}{folders.weights}"] = _tensor_writer(top, dialect.header(raw))
    if dialect.config_file:
        writers[f"{prefix}{folders.config}"] = _json_writer(main)
    return writers


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
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
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    name: str = files.WEIGHTS_NAME,
    state: xxh3_128 | None = None,
) -> Callable[[Path], None]:
    if name.endswith(".bin"):
        return lambda path: torch_files.write(path, tensors)
    return lambda path: files.write_tensors(path, tensors, metadata, state)


def checkpoint_files(path: Path, layouts: Iterable[Dialect]) -> list[str]:
    """The files that a checkpoint in this directory may consist of, in any of these layouts, as `store` names them."""
    found = [files.CONFIG_NAME, files.WEIGHTS_NAME, BIN_NAME, NPZ_NAME]
    if path.is_dir():
        with Directory(path) as directory:
            for folders in dict.fromkeys(d.folders for d in layouts if d.folders is not None):
                found += _files_in_folders(directory, folders)
    return found


def _files_in_folders(directory: Directory, folders: Folders) -> list[str]:
    """Those with this kind of folders; none if there is no main config."""
    if folders.by_option or not (directory.path / folders.main / folders.config).is_file():
        return []
    try:
        experts = directory.experts(folders)
    except CheckpointError:
        experts = None
    if experts is None and not folders.main:
        return []  # the config of another layout
    named = (folders.name.format(expert=n) for n in experts or ())
    ours = [name for name, path in zip(named, (experts or {}).values(), strict=True) if path == directory.path / name]
    found = [str(Path(folders.main, name)) for name in (folders.config, folders.weights)]
    found += [str(Path(part, name)) for part in ours for name in (files.CONFIG_NAME, files.WEIGHTS_NAME)]
    return [*found, *([folders.sidecar] if folders.sidecar else [])]
