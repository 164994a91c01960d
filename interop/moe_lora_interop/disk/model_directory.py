"""A model directory's safetensors files as one mapping from key to tensor. Headers first; tensors one at a time."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moe_lora_interop.disk import files
from moe_lora_interop.disk.dtypes import NUMPY
from moe_lora_interop.disk.files import TensorInfo, read_header, read_json
from moe_lora_interop.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFiles(ExitStack):
    """`model.safetensors`, or the shards that `model.safetensors.index.json` lists (in that order, like transformers).

    A context manager. Entering memory-maps the files and reads their headers only.

    Attributes:
        directory: where they are.
        infos: {key: dtype and shape}.
    """

    def __init__(self, directory: Path):
        """Raises CheckpointError, with every problem of the index and the files."""
        super().__init__()
        self.directory = directory
        self.infos: dict[str, TensorInfo] = {}
        self._handles: dict[str, Any] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def read(self, key: str) -> np.ndarray:
        """One tensor, in the stored dtype."""
        return self._handles[key].get_tensor(key)

    def read_part(self, key: str, index: tuple[slice, ...]) -> np.ndarray:
        """A tensor's part, one slice per axis; the rest of it is not read."""
        return self._handles[key].get_slice(key)[index]

    def _open(self) -> None:
        index = self._index()
        problems: list[str] = []
        for name in [SINGLE] if index is None else sorted(set(index.values())):
            try:
                infos, _ = read_header(self.directory / name)
                handle = self.enter_context(safe_open(self.directory / name, framework="numpy"))
            except CheckpointError as error:
                problems.extend(error.problems)
                continue
            except (OSError, SafetensorError) as error:
                problems.append(f"{name}: {error}")
                continue
            for key, info in infos.items():
                if index is not None and index.get(key) != name:
                    problems.append(f"{key}: found in {name}, but the index says {index.get(key)}")
                    continue
                self._handles[key], self.infos[key] = handle, info
        if not problems and index is not None:
            absent = {key: name for key, name in index.items() if key not in self.infos}
            problems = [f"{key}: not in {name}, where the index puts it" for key, name in absent.items()]
        if problems:
            raise CheckpointError(f"cannot read the weights in {self.directory}", problems)

    def _index(self) -> dict[str, str] | None:
        """key -> file name, or None if there is a single file."""
        if (self.directory / SINGLE).is_file():
            return None
        if not (self.directory / INDEX).is_file():
            found = sorted(path.name for path in self.directory.glob("*.bin"))
            hint = f"; {', '.join(found)} is a pickle: save the model as safetensors first" if found else ""
            raise CheckpointError(f"no weights in {self.directory}", [f"neither {SINGLE} nor {INDEX}{hint}"])
        index = read_json(self.directory / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"cannot read {self.directory / INDEX}", ["weight_map: missing or empty"])
        # An index comes with the download: it must not point outside its directory.
        bad = [f"{key}: {name!r} is not a file name" for key, name in index.items() if Path(str(name)).name != name]
        if bad:
            raise CheckpointError(f"cannot read {self.directory / INDEX}", bad)
        return index


# What belongs to a model beside config and weights, as far as it can be copied unread.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class BaseModel(WeightFiles):
    """`WeightFiles` with its config; a context manager.

    Attributes:
        config: config.json.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Reads headers only. Raises CheckpointError: not a model directory, or its files do not belong together."""
        super().__init__(files.existing_directory(directory))
        try:
            self.config: dict[str, Any] = files.read_json(self.directory / "config.json")
            wrong = [f"{n}: dtype {i.dtype}" for n, i in self.infos.items() if i.dtype not in NUMPY]
            if wrong:
                raise CheckpointError(f"{self.directory} cannot be read: expected {', '.join(NUMPY)}", wrong)
        except BaseException:
            self.close()
            raise

    def copied(self) -> list[Path]:
        """The tokenizer's and other small files that are there."""
        return [self.directory / name for name in COPIED if (self.directory / name).is_file()]
