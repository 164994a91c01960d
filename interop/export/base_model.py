"""The files of a Hugging Face model directory: config, tensor headers, and one tensor at a time."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from interop import files
from interop.errors import CheckpointError
from interop.files import TensorInfo

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
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


class BaseModel(ExitStack):
    """A context manager over memory-mapped files.

    Attributes:
        directory: where they are.
        config: config.json.
        infos: {tensor name: dtype and shape}.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Reads headers only. Raises CheckpointError: not a model directory, or its files do not belong together."""
        super().__init__()
        self.directory = files.existing_directory(directory)
        self.config: dict[str, Any] = files.read_json(self.directory / "config.json")
        self.infos: dict[str, TensorInfo] = {}
        self._handles: dict[str, Any] = {}
        try:
            for name in self._shards():
                self._open(self.directory / name)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype."""
        return self._handles[name].get_tensor(name)

    def copied(self) -> list[Path]:
        """The tokenizer's and other small files that are there."""
        return [self.directory / name for name in COPIED if (self.directory / name).is_file()]

    def _shards(self) -> list[str]:
        if (self.directory / SINGLE).is_file():
            return [SINGLE]
        if not (self.directory / INDEX).is_file():
            raise CheckpointError("not a base model", [f"{self.directory}: has neither {SINGLE} nor {INDEX}"])
        weight_map = files.read_json(self.directory / INDEX).get("weight_map")
        names = sorted({str(n) for n in weight_map.values()}) if isinstance(weight_map, dict) else []
        if not names or any(Path(name).name != name for name in names):
            problem = f"{self.directory / INDEX}: weight_map {names}, expected names of files in this directory"
            raise CheckpointError("not a base model", [problem])
        return names

    def _open(self, path: Path) -> None:
        infos, _ = files.read_header(path)
        twice = [f"{path}: {name} is in another file too" for name in infos if name in self.infos]
        wrong = [f"{path}: {n} has dtype {i.dtype}" for n, i in infos.items() if i.dtype not in files.DTYPES]
        if twice or wrong:
            raise CheckpointError("not a base model that can be read", twice + wrong)
        try:
            handle = self.enter_context(safe_open(path, framework="numpy"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError("unreadable safetensors file", [f"{path}: {error}"]) from error
        self.infos.update(infos)
        self._handles.update(dict.fromkeys(infos, handle))
