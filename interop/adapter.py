"""An adapter in memory: a config and tensors in canonical axes; read from and written to a directory in any layout."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from interop import files
from interop.card import CARD_NAME, model_card
from interop.config import FORMAT_VERSION, MoeLoraConfig
from interop.digest import NAME as DIGEST
from interop.digest import digest
from interop.errors import CheckpointError, ConfigError
from interop.presence import layout_problems
from interop.rules import decode, encode
from interop.tables import FILE_DIALECTS, dialect_named

METADATA = {"format": "pt", "format_version": str(FORMAT_VERSION)}
Tensors = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class Adapter:
    """A mixture-of-LoRA adapter.

    Attributes:
        config: with target_modules resolved to the sorted list of modules that have tensors.
        tensors: {(module, role): array}; roles and their canonical axes are `interop.rules.ROLES`.

    Raises:
        CheckpointError: a tensor that the config implies is missing, one it does not imply is present, or one has
            another shape or dtype; all of them are listed.
    """

    config: MoeLoraConfig
    tensors: Mapping[tuple[str, str], np.ndarray]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", dict(self.tensors))
        problems = layout_problems(self.config, self.tensors)
        if problems:
            raise CheckpointError("the tensors do not fit the config", problems)
        object.__setattr__(self, "config", self.config.resolved(self.modules))

    @property
    def modules(self) -> list[str]:
        """The sorted paths of the modules that the adapter changes."""
        return sorted({module for module, _ in self.tensors})


def config_sizes(config: MoeLoraConfig):  # noqa: ANN201
    """The sizes that only a config knows, as `interop.rules` asks for them."""

    def sizes(module: str) -> dict[str, int | tuple[int, ...]]:
        of_module = config.for_module(module)
        return {"expert": of_module.num_experts, "rank": of_module.ranks}

    return sizes


def detect(directory: str | os.PathLike[str]) -> str:
    """The name of the one layout whose rules describe every tensor in `directory`.

    Raises:
        CheckpointError: none or several fit; each candidate is listed with the reason.
    """
    infos, _ = files.read_header(files.existing_directory(directory) / files.WEIGHTS_NAME)
    reasons = {}
    for dialect in FILE_DIALECTS:
        unclaimed = [name for name, info in infos.items() if dialect.claim(name, len(info.shape)) is None]
        reasons[dialect.name] = f"no rule for {unclaimed[0]} and {len(unclaimed) - 1} more" if unclaimed else ""
    fitting = [name for name, reason in reasons.items() if not reason]
    if len(fitting) == 1 and infos:
        return fitting[0]
    problems = [f"{name}: {reason or 'fits'}" for name, reason in reasons.items()]
    raise CheckpointError(f"{directory} is in no known layout" if infos else f"{directory} has no tensors", problems)


def read(directory: str | os.PathLike[str], dialect: str | None = None, **options: Any) -> Adapter:
    """Reads an adapter.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        dialect: the layout's name; None detects it from the tensor names.
        options: what the layout does not record.

    Raises:
        CheckpointError, ConfigError: with every problem found.
    """
    path = files.existing_directory(directory)
    raw = files.read_json(path / files.CONFIG_NAME)
    if options:
        raise CheckpointError("unknown options", [f"{name}: layout 'native' takes no options" for name in options])
    config = MoeLoraConfig.from_dict(raw)
    table = dialect_named(dialect or detect(path))
    stored = files.read_tensors(path / files.WEIGHTS_NAME)
    _check_digest(path, config, stored)
    tensors, problems = decode(table, stored, config_sizes(config))
    try:
        adapter_problems = layout_problems(config, tensors)
    except ConfigError as error:
        adapter_problems = list(error.problems)
    if problems or adapter_problems:
        raise CheckpointError(f"{path} is not a complete {table.name} adapter", [*problems, *adapter_problems])
    return Adapter(config, tensors)


def write(adapter: Adapter, directory: str | os.PathLike[str], dialect: str = "native") -> None:
    """Writes an adapter: config, tensors, and a model card unless the directory has a README.md already.

    Raises:
        CheckpointError: the layout cannot hold something, or the disk refuses; the old checkpoint is then intact.
    """
    table = dialect_named(dialect)
    stored, problems = encode(table, adapter.tensors, config_sizes(adapter.config))
    if problems:
        raise CheckpointError(f"cannot be written as {dialect}", problems)
    metadata = {**METADATA, DIGEST: digest(adapter.config, stored, METADATA)}
    config_text = json.dumps(adapter.config.to_dict(), indent=2, sort_keys=True) + "\n"
    target = Path(directory)
    writers = {
        files.CONFIG_NAME: lambda p: _write_text(p, config_text),
        files.WEIGHTS_NAME: lambda p: files.write_tensors(p, stored, metadata),
    }
    if not (target / CARD_NAME).exists():
        card = model_card(adapter.config, {n: (str(t.dtype), t.shape) for n, t in stored.items()})
        writers[CARD_NAME] = lambda p: _write_text(p, card)
    files.replace_files(target, writers)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


def _check_digest(path: Path, config: MoeLoraConfig, stored: Mapping[str, np.ndarray]) -> None:
    """PEFT writes no digest, so it is optional; when there is one it must be right."""
    _, metadata = files.read_header(path / files.WEIGHTS_NAME)
    if DIGEST in metadata and metadata[DIGEST] != (found := digest(config, stored, metadata)):
        problem = f"digest: the file says {metadata[DIGEST]}, its config and tensors give {found}"
        raise CheckpointError(f"{path} is damaged, or its two files do not belong together", [problem])
