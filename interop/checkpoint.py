"""Adapters in directories: detect a layout, read any, write any."""

import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interop import files, storage
from interop.adapter import Adapter, config_sizes
from interop.atomic import PREVIOUS, is_being_replaced, replace_files
from interop.card import CARD_NAME, model_card
from interop.config import FORMAT_VERSION, PEFT_TYPE, MoeLoraConfig
from interop.config_fields import config_of, differences, options_of, raw_of
from interop.dialect import Dialect
from interop.digest import NAME as DIGEST
from interop.digest import digest
from interop.errors import CheckpointError, ConfigError
from interop.presence import layout_problems
from interop.prototypes import complete_prototypes
from interop.registry import dialect_named, file_dialects
from interop.rules import Canonical, decode, encode

CHECKPOINT_FILES = (files.CONFIG_NAME, files.WEIGHTS_NAME, storage.BIN_NAME, storage.NPZ_NAME)
RETRIES = 5
METADATA = {"format": "pt", "format_version": str(FORMAT_VERSION)}


def detect(directory: str | os.PathLike[str]) -> str:
    """The name of the one layout that describes every tensor and the config in `directory`.

    Raises:
        CheckpointError: none or several fit; each candidate is listed with the reason.
    """
    path = files.existing_directory(directory)
    reasons: dict[str, list[str]] = {}
    known = file_dialects()
    in_folders = [d for d in known if d.folders is not None and storage.folders_in(path, d.folders) is not None]
    candidates = in_folders or [d for d in known if d.folders is None]
    for dialect in candidates:
        stored = storage.open_directory(path, dialect if dialect.folders else None, {})
        shapes = {name: info.shape for name, info in stored.infos.items()}
        reasons[dialect.name] = dialect.misfits(shapes, stored.raw)
    fitting = [name for name, problems in reasons.items() if not problems]
    if len(fitting) == 1:
        return fitting[0]
    config = path / files.CONFIG_NAME
    if not fitting and not in_folders and not config.exists():
        raise CheckpointError("not a checkpoint", [f"{config}: missing file"])
    problems = [f"{name}: {'; '.join(reason) or 'fits'}" for name, reason in reasons.items()]
    if fitting:
        raise CheckpointError(f"{path} fits several layouts, name one", problems)
    raise CheckpointError(f"{path} is in no known layout", problems)


def read(directory: str | os.PathLike[str], dialect: str | None = None, **options: Any) -> Adapter:
    """Reads an adapter.

    Args:
        directory: the checkpoint.
        dialect: the layout's name; None detects it from the tensors' names and the config.
        options: what the layout does not record (`moe-lora dialects` lists them).

    Raises:
        CheckpointError, ConfigError: with every problem found.
    """
    path = files.existing_directory(directory)
    for attempt in range(RETRIES):  # another process may be saving into this directory
        try:
            adapter = _read(path, dialect, options)
            if not is_being_replaced(path) or _has_digest(path):
                return adapter
        except (CheckpointError, ConfigError):
            if not is_being_replaced(path):
                raise
        time.sleep(0.05 * 2**attempt)
    problem = f"the adapter that was there before is complete in {path / PREVIOUS}; saving again also puts it in order"
    raise CheckpointError(f"a save into {path} was interrupted, or is still going on", [problem])


def _read(path: Path, dialect: str | None, options: Mapping[str, Any]) -> Adapter:
    table = dialect_named(dialect or ("native" if _says_native(path) else detect(path)))
    stored = storage.open_directory(path, table, options)
    table = table.specialised(stored.raw)
    if table.name == "native":
        config = MoeLoraConfig.from_dict(stored.raw)
        problems = [f"option {name}: layout 'native' takes no options" for name in options]
        tensors, found = decode(table.rules, stored.tensors(), config_sizes(config))
        _check_digest(path, config, stored.tensors())
        return _adapter(path, table, config, tensors, problems + found)
    tensors, problems = decode(table.rules, stored.tensors(), _raw_sizes(table, stored.raw))
    if table.folders is not None and table.folders.sidecar:
        tensors = complete_prototypes(tensors)
    try:
        config = config_of(table, stored.raw, tensors, options)
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be read as {table.name}", [*problems, *error.problems]) from None
    tensors, problems = decode(table.rules, stored.tensors(), config_sizes(config))  # now with every size known
    if table.folders is not None and table.folders.sidecar:
        tensors = complete_prototypes(tensors)
    return _adapter(path, table, config, tensors, problems)


def _says_native(path: Path) -> bool:
    """Whether the config is ours: then what does not fit is wrong, not of another layout."""
    config = path / files.CONFIG_NAME
    return config.exists() and files.read_json(config).get("peft_type") == PEFT_TYPE


def write(
    adapter: Adapter,
    directory: str | os.PathLike[str],
    dialect: str = "native",
    *,
    allow_loss: Collection[str] = (),
    duplicates: bool = False,
) -> None:
    """Writes an adapter, and a model card unless the directory has a README.md already.

    Args:
        adapter: what to write.
        directory: created if missing; an older checkpoint in it is replaced as a whole.
        dialect: the layout's name.
        allow_loss: config fields that may be lost because the layout cannot express them.
        duplicates: also write the tensors that a layout's own program stores twice.

    Raises:
        CheckpointError: the layout cannot hold something, or the disk refuses; the old checkpoint is then intact.
        ConfigError: the layout cannot express a config field that is not in `allow_loss`.
    """
    table, config = dialect_named(dialect), adapter.config
    if table.name == "native":
        raw = config.to_dict()
    else:
        raw = _foreign_config(table, adapter, allow_loss)
    rules = table.specialised(raw).rules
    tensors, problems = encode(rules, adapter.tensors, config_sizes(config), duplicates=duplicates)
    if problems:
        raise CheckpointError(f"cannot be written as {dialect}", problems)
    metadata = {"format": "pt"}
    writers = {}
    target = Path(directory)
    if table.name == "native":
        metadata = {**METADATA, DIGEST: digest(config, tensors, METADATA)}
        if not (target / CARD_NAME).exists():
            card = model_card(config, {n: (str(t.dtype), t.shape) for n, t in tensors.items()})
            writers[CARD_NAME] = lambda p: p.write_text(card, "utf-8", errors="replace")
    replace_files(target, {**storage.store(target, table, raw, tensors, metadata), **writers}, stale=CHECKPOINT_FILES)


def _foreign_config(table: Dialect, adapter: Adapter, allow_loss: Collection[str]) -> dict[str, Any]:
    """Their config for ours, checked by reading it back: what comes back different cannot be expressed."""
    config, modules = adapter.config, adapter.modules
    raw = raw_of(table, config, adapter.tensors, modules)
    try:
        back = config_of(table, raw, adapter.tensors, options_of(table, config, modules))
    except ConfigError as error:
        raise ConfigError(f"layout {table.name!r} cannot express the config", error.problems) from None
    lost = {n: found for n, found in differences(config, back, modules).items() if n not in allow_loss}
    if lost:
        problems = [f"{n}: {mine!r} would be read back as {theirs!r}" for n, (mine, theirs) in lost.items()]
        raise ConfigError(f"layout {table.name!r} cannot express the config", problems)
    return raw


def _adapter(path: Path, table: Dialect, config: MoeLoraConfig, tensors: Canonical, problems: list[str]) -> Adapter:
    found = problems + layout_problems(config, tensors)
    if found:
        found += [table.hint] if table.hint else []
        raise CheckpointError(f"{path} is not a complete {table.name} adapter", found)
    return Adapter(config, tensors)


def _raw_sizes(table: Dialect, raw: Mapping[str, Any]):  # noqa: ANN202
    """What is known of the sizes before the config is: the number of experts, if their config has it."""
    names = {f.ours: f.theirs for f in table.fields}
    experts, splits = raw.get(names.get("num_experts", "")), raw.get(names.get("n_splits", ""))
    known = {a: v for a, v in (("expert", experts), ("split", splits)) if isinstance(v, int) and v > 0}
    return lambda module: known


def _has_digest(path: Path) -> bool:
    """Whether a mixture of two saves in this directory would be noticed."""
    weights = storage.weights_path(path)
    return weights.suffix == ".safetensors" and DIGEST in files.read_header(weights)[1]


def _check_digest(path: Path, config: MoeLoraConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """PEFT writes no digest, so it is optional; when there is one it must be right."""
    weights = storage.weights_path(path)
    metadata = files.read_header(weights)[1] if weights.suffix == ".safetensors" else {}
    if "format_version" in metadata and DIGEST not in metadata:
        problem = f"header metadata: found {metadata}, expected {DIGEST!r} beside 'format_version'"
        raise CheckpointError(f"{path} is damaged", [problem])
    if DIGEST in metadata and metadata[DIGEST] != (found := digest(config, tensors, metadata)):
        problem = f"digest: the file says {metadata[DIGEST]}, its config and tensors give {found}"
        raise CheckpointError(f"{path} is damaged, or its two files do not belong together", [problem])
