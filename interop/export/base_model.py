"""The files of a Hugging Face model directory that an export reads: config, weights, and what is copied unread."""

import os
from pathlib import Path
from typing import Any

from interop import files
from interop.errors import CheckpointError
from interop.weight_files import WeightFiles

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
            wrong = [f"{n}: dtype {i.dtype}" for n, i in self.infos.items() if i.dtype not in files.DTYPES]
            if wrong:
                raise CheckpointError(f"{self.directory} cannot be read: expected {', '.join(files.DTYPES)}", wrong)
        except BaseException:
            self.close()
            raise

    def copied(self) -> list[Path]:
        """The tokenizer's and other small files that are there."""
        return [self.directory / name for name in COPIED if (self.directory / name).is_file()]
