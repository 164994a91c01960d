"""A directory in any layout, as one config and one flat set of tensors; folders become part of a tensor's name.

With `Folders`, a tensor of the main file is `main/NAME`, of expert e's folder `e/NAME`, of the sidecar `sidecar/NAME`;
the experts' configs are the list `experts` of the main config, their number its `num_experts`.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_lora_interop.disk import files, lazy, limits, torch_files
from moe_lora_interop.disk.dtypes import STORED
from moe_lora_interop.disk.files import TensorFile, TensorInfo
from moe_lora_interop.disk.lazy import Lazy, Tensor
from moe_lora_interop.disk.npz import read_npz
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.rules.dialect import Dialect, Folders, lookup

BIN_NAME = "adapter_model.bin"
NPZ_NAME = "adapter_model.npz"
WEIGHTS_NAMES = (files.WEIGHTS_NAME, BIN_NAME, NPZ_NAME)


class Weights(Protocol):
    """A file of tensors: a `TensorFile`, or one that was read as a whole."""

    @property
    def infos(self) -> dict[str, TensorInfo]: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    def tensors(self) -> dict[str, Lazy]: ...


class InMemory:
    """The tensors of a file without a header."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays
        self.infos = {n: TensorInfo(STORED.get(a.dtype.name, a.dtype.name), a.shape) for n, a in arrays.items()}
        self.metadata: dict[str, str] = {}

    def tensors(self) -> dict[str, Lazy]:
        return {name: lazy.in_memory(array) for name, array in self._arrays.items()}


@dataclass(frozen=True)
class Stored:
    """What a layout finds in a directory.

    Attributes:
        raw: the config; {} if there is none.
        parts: {prefix of the flat names: file}.
    """

    raw: dict[str, Any]
    parts: dict[str, Weights]

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """{flat name: dtype and shape}."""
        return {prefix + name: info for prefix, part in self.parts.items() for name, info in part.infos.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """Of the last file that has any."""
        return next((part.metadata for part in reversed(self.parts.values()) if part.metadata), {})

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its flat name, read when it is asked for (`disk.lazy`), while the directory is open."""
        return {prefix + name: tensor for prefix, part in self.parts.items() for name, tensor in part.tensors().items()}


class Directory(ExitStack):
    """A directory that is opened once: whoever asks for a file of it gets what was parsed the first time.

    A context manager. The files stay open, so that a save in the meantime changes nothing.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Raises CheckpointError: no directory."""
        super().__init__()
        self.path = files.existing_directory(path)
        self._seen: dict[Path, tuple[int, int] | None] = {}
        self._configs: dict[Path, dict[str, Any]] = {}
        self._weights: dict[Path, Weights] = {}

    def unchanged(self) -> bool:
        """Whether every file is still the one that was looked at: a save replaces it by a new one."""
        return all(_identity(path) == identity for path, identity in self._seen.items())

    def config(self, folder: str = "") -> dict[str, Any] | None:
        """The adapter_config.json of the directory, or of a folder in it; None if there is none."""
        path = self.path / folder / files.CONFIG_NAME
        return self._config(path) if self._look(path).exists() else None

    def stored(self, dialect: Dialect | None = None, options: Mapping[str, Any] | None = None) -> Stored:
        """What layout `dialect` finds here (None: any with all tensors in one file).

        Raises:
            CheckpointError: not a checkpoint, or a part of it is missing or unreadable.
        """
        if dialect is not None and dialect.folders is not None:
            raw, paths = self._in_folders(dialect.folders, options or {})
        elif dialect is not None and dialect.has_own_file:
            raw, paths = {}, {"": self._own_file(dialect.weights)}
        elif dialect is not None and dialect.config_file:
            raw, paths = self._config(self.path / files.CONFIG_NAME), {"": self._weights_path()}
        else:
            raw, paths = self.config() or {}, {"": self._weights_path()}
        found = Stored(raw, {prefix: self._weights_of(path) for prefix, path in paths.items()})
        if absurd := limits.tensor_problems((name, info.shape) for name, info in found.infos.items()):
            raise CheckpointError("unreadable tensors", absurd)
        return found

    def has(self, name: str) -> bool:
        """Whether there is something of this name."""
        return self._look(self.path / name).exists()

    def experts(self, folders: Folders) -> dict[str, Path] | None:
        """{expert number: folder} as the main config names them; None if there is no such config."""
        path = self._look(self.path / folders.main / folders.config)
        if folders.by_option or not path.is_file():
            return None
        return self._named(folders, lookup(self._config(path), folders.listed_in, None), path)

    def names_experts(self, folders: Folders) -> bool:
        """Whether there is a main config that names experts, rightly or not."""
        path = self._look(self.path / folders.main / folders.config)
        if folders.by_option or not path.is_file():
            return False
        return isinstance(lookup(self._config(path), folders.listed_in, None), list | Mapping)

    def _named(self, folders: Folders, listed: Any, where: Path, *, given: bool = False) -> dict[str, Path] | None:
        """{expert number: folder}; None for what is no list of any kind."""
        if isinstance(listed, Mapping):
            named = {str(n): name for n, name in listed.items()}
        elif isinstance(listed, list):
            named = {str(n): name for n, name in enumerate(listed)}
        else:
            return None
        # whoever gives an option may name any folder; a file that was downloaded may not
        wrong = len(named) > limits.FOLDERS or any(
            not isinstance(p, str) or (os.path.isabs(p) and not given) or not p.isprintable() for p in named.values()
        )
        if wrong or sorted(named, key=lambda n: (len(n), n)) != [str(n) for n in range(len(named))]:
            problem = (
                f"{folders.listed_in}: found {listed!r}, expected at most {limits.FOLDERS} relative folders numbered "
                "from 0"
            )
            raise CheckpointError(f"{where} does not name its experts", [problem])
        places = {os.path.realpath(self.path / name) for name in named.values()}
        inside = os.path.join(os.path.realpath(self.path), "")
        anywhere = folders.outside or given
        if len(places) < len(named) or not (anywhere or all(place.startswith(inside) for place in places)):
            there = "" if anywhere else f" inside {self.path}"
            problem = f"{folders.listed_in}: found {listed!r}, expected different folders{there}"
            raise CheckpointError(f"{where} does not name its experts", [problem])
        return {n: self.path / name for n, name in named.items()}

    def _in_folders(self, folders: Folders, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
        main = self.path / folders.main
        if folders.by_option:
            return self._configs_by_option(folders, options), {"main/": self._own_file(folders.weights)}
        given = options.get(folders.listed_in)
        found = self.experts(folders) if given is None else self._named(folders, given, self.path, given=True)
        if found is None:
            problem = f"{main / folders.config}: no {folders.listed_in} that names the experts"
            raise CheckpointError("not a checkpoint", [problem])
        names = [folders.weights]
        if folders.weights != files.WEIGHTS_NAME:
            names += [str(Path(folders.weights).with_suffix(".pt"))]
        there = [main / name for name in names if self._look(main / name).exists()]
        paths = {"main/": there[0]} if there else {}
        raw = {**self._config(main / folders.config), **self._configs_of(found)}
        paths |= {f"{n}/": path / files.WEIGHTS_NAME for n, path in found.items()}
        if folders.sidecar:
            given = options.get(Path(folders.sidecar).stem)
            sidecar = Path(given) if given is not None else self.path / folders.sidecar
            if given is not None or os.path.lexists(sidecar):
                paths["sidecar/"] = sidecar
        return raw, paths

    def _configs_by_option(self, folders: Folders, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the experts, if the option is given."""
        name = folders.listed_in
        if name not in options:
            return {}
        found = self._named(folders, options[name], self.path, given=True)
        if found is None:
            problem = f"option {name}: found {options[name]!r}, expected a list of folders"
            raise CheckpointError("invalid options", [problem])
        return self._configs_of(found)

    def _configs_of(self, experts: Mapping[str, Path]) -> dict[str, Any]:
        missing = [f"expert {n}: {path} is no directory" for n, path in experts.items() if not os.path.isdir(path)]
        if missing:
            raise CheckpointError("experts are missing", missing)
        configs = [self._config(path / files.CONFIG_NAME) for path in experts.values()]
        return {"experts": configs, "num_experts": len(experts)}

    def _weights_path(self) -> Path:
        """The weights file that is there; safetensors before .bin before .npz."""
        found = next((self.path / n for n in WEIGHTS_NAMES if self._look(self.path / n).exists()), None)
        if found is None:
            problems = [f"{self.path}: missing file, expected one of {', '.join(WEIGHTS_NAMES)}"]
            problems += [line for name in WEIGHTS_NAMES for line in files.shards_of(self.path / name)]
            if not (self.path / files.CONFIG_NAME).exists():
                problems.append(f"{self.path / files.CONFIG_NAME}: missing file")
            if (self.path / "config.json").is_file():
                problems.append(f"{self.path} is a model's directory, expected an adapter's")
            inside = sorted(path.parent.name for path in self.path.glob(f"*/{files.CONFIG_NAME}"))
            if inside:
                problems.append(f"adapters are in its folders {', '.join(inside)}: expected one of these")
            raise CheckpointError("not a checkpoint", problems)
        return found

    def _own_file(self, name: str) -> Path:
        """The file of a layout that has a name of its own for it."""
        path = self._look(self.path / name)
        if not path.exists():
            raise CheckpointError("not a checkpoint", [f"{path}: missing file", *files.shards_of(path)])
        return path

    def _look(self, path: Path) -> Path:
        """The path, before anything of it is known: from here on it must not change."""
        if path not in self._seen:
            self._seen[path] = _identity(path)
        return path

    def _config(self, path: Path) -> dict[str, Any]:
        if path not in self._configs:
            self._configs[path] = files.read_json(self._look(path))
        return self._configs[path]

    def _weights_of(self, path: Path) -> Weights:
        if path not in self._weights:
            self._look(path)
            if path.suffix == ".safetensors":
                self._weights[path] = self.enter_context(TensorFile(path))
            else:
                self._weights[path] = InMemory(read_npz(path) if path.suffix == ".npz" else torch_files.read(path))
        return self._weights[path]


def _identity(path: Path) -> tuple[int, int] | None:
    """(inode, time in nanoseconds), or None if there is nothing."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_ino, status.st_mtime_ns
