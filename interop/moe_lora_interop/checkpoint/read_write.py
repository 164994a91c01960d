"""Adapters in directories: detect a layout, read any, write any."""

import contextlib
import os
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_lora_interop.checkpoint import directory as storage
from moe_lora_interop.checkpoint.adapter import Adapter, config_sizes
from moe_lora_interop.checkpoint.base_tensors import check_no_whole_modules, warn_of_base_tensors
from moe_lora_interop.checkpoint.card import CARD_NAME, model_card
from moe_lora_interop.checkpoint.prototypes import complete_prototypes
from moe_lora_interop.config.adapter_config import FORMAT_VERSION, PEFT_TYPE, MoeLoraConfig
from moe_lora_interop.dialects.registry import dialect_named, file_dialects
from moe_lora_interop.disk import files
from moe_lora_interop.disk.atomic import PREVIOUS, is_being_replaced, replace_files, will_remain
from moe_lora_interop.disk.digest import NAME as DIGEST
from moe_lora_interop.disk.digest import begun, digest
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_interop.rules.base_tensors import base_tensors
from moe_lora_interop.rules.configs import config_of, differences, options_of, raw_of
from moe_lora_interop.rules.dialect import Dialect
from moe_lora_interop.rules.tensors import Canonical, Sizes, decode, encode

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
    in_one_file = None if in_folders else storage.open_directory(path, None, {})  # opened once: .bin is read whole
    for dialect in candidates:
        stored = in_one_file or storage.open_directory(path, dialect, {})
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

    Warns:
        UserWarning: the file also holds tensors of the base model (`Adapter.base_tensors`), which nothing was compared
            with. `mlj.load_adapter` compares them with the model, `verify` with a directory.
    """
    adapter = read_with_base(directory, dialect, **options)
    warn_of_base_tensors(os.fspath(directory), adapter.base_tensors)
    return adapter


def read_with_base(directory: str | os.PathLike[str], dialect: str | None = None, **options: Any) -> Adapter:
    """`read` for callers that compare the adapter's `base_tensors` with a base model themselves."""
    with opened(directory, dialect, **options) as adapter:
        return Adapter(adapter.config, _in_memory(adapter.tensors), _in_memory(adapter.base_tensors))


def _in_memory(tensors: Mapping[Any, np.ndarray]) -> dict[Any, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


@contextlib.contextmanager
def opened(directory: str | os.PathLike[str], dialect: str | None = None, **options: Any) -> Iterator[Adapter]:
    """The adapter that `read` reads, checked as there, but its tensors are read when asked for (`disk.lazy`).

    The files stay open within the context, so that a save in the meantime changes nothing.
    """
    path = files.existing_directory(directory)
    for attempt in range(RETRIES):  # another process may be saving into this directory
        before = _identity(path)
        with contextlib.ExitStack() as sources:
            try:
                adapter, has_digest = _open(path, dialect, options, sources)
            except (CheckpointError, ConfigError):
                if before == _identity(path) and not is_being_replaced(path):
                    raise
            else:
                if before == _identity(path) and (has_digest or not is_being_replaced(path)):
                    yield adapter
                    return
        time.sleep(0.05 * 2**attempt)
    problem = f"what was there before is complete in {path / PREVIOUS}; saving again also puts it in order"
    raise CheckpointError(f"a save into {path} was interrupted, or is still going on", [problem])


def _open(
    path: Path, dialect: str | None, options: Mapping[str, Any], sources: contextlib.ExitStack
) -> tuple[Adapter, bool]:
    """The adapter, and whether it has a digest: then a mixture of two saves would have been noticed."""
    table = dialect_named(dialect or layout_of(path))
    stored = storage.open_directory(path, table, options)
    table = table.specialised(stored.raw)
    flat = stored.tensors(sources)
    check_no_whole_modules(path, stored.raw, flat)
    of_base = base_tensors(table.rules, flat)
    if table.name == "native":
        config = MoeLoraConfig.from_dict(stored.raw)
        problems = [f"option {name}: layout 'native' takes no options" for name in options]
        tensors, found = decode(table.rules, flat, config_sizes(config))
        _check_digest(path, config, flat, stored.metadata)
        return _adapter(path, table, config, tensors, of_base, problems + found), DIGEST in stored.metadata

    def decoded(sizes: Sizes) -> tuple[Canonical, list[str]]:
        tensors, problems = decode(table.rules, flat, sizes)
        has_sidecar = table.folders is not None and table.folders.sidecar
        return complete_prototypes(tensors) if has_sidecar else tensors, problems

    tensors, problems = decoded(_raw_sizes(table, stored.raw))
    try:
        config = config_of(table, stored.raw, tensors, options)
    except ConfigError as error:
        raise ConfigError(f"{path} cannot be read as {table.name}", [*problems, *error.problems]) from None
    tensors, problems = decoded(config_sizes(config))  # now with every size known
    return _adapter(path, table, config, tensors, of_base, problems), False


def layout_of(path: Path) -> str:
    """The native one if the config says so: then what does not fit is wrong, not of another layout; else `detect`."""
    return "native" if _says_native(path) else detect(path)


def _says_native(path: Path) -> bool:
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

    Warns:
        UserWarning: the adapter came with tensors of its base model (`Adapter.base_tensors`), which are not written.
    """
    warn_of_base_tensors(os.fspath(directory), adapter.base_tensors)
    table, config = dialect_named(dialect), adapter.config
    if table.name == "native":
        raw = config.to_dict()
    else:
        raw = _foreign_config(table, adapter, allow_loss)
    rules = table.specialised(raw).rules
    tensors, problems = encode(rules, adapter.tensors, config_sizes(config), duplicates=duplicates)
    if problems:
        raise CheckpointError(f"cannot be written as {dialect}", problems)
    metadata, state = {"format": "pt"}, None
    writers = {}
    target = Path(directory)
    if table.name == "native":
        metadata, state = METADATA, begun(config.semantic_dict(), tensors, METADATA)
        if not will_remain(target, CARD_NAME):
            card = model_card(config, {n: (str(t.dtype), t.shape) for n, t in tensors.items()})
            writers[CARD_NAME] = lambda p: p.write_text(card, "utf-8", errors="replace")
    writers |= storage.store(target, table, raw, tensors, metadata, state)
    replace_files(target, writers, stale=_names(target))


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


def _adapter(
    path: Path,
    table: Dialect,
    config: MoeLoraConfig,
    tensors: Canonical,
    of_base: Mapping[str, np.ndarray],
    problems: list[str],
) -> Adapter:
    try:
        adapter, found = Adapter(config, tensors, of_base), problems
    except CheckpointError as error:
        found = [*problems, *error.problems]
    if found:
        found += [table.hint] if table.hint else []
        raise CheckpointError(f"{path} is not a complete {table.name} adapter", found)
    return adapter


def _raw_sizes(table: Dialect, raw: Mapping[str, Any]) -> Sizes:
    """What is known of the sizes before the config is: the number of experts, if their config has it."""
    names = {f.ours: f.theirs for f in table.fields}
    experts, splits = raw.get(names.get("num_experts", "")), raw.get(names.get("n_splits", ""))
    known = {a: v for a, v in (("expert", experts), ("split", splits)) if isinstance(v, int) and v > 0}
    return lambda module: known


def _names(directory: Path) -> list[str]:
    """The files that a checkpoint in this directory may consist of, in any layout."""
    folders = [d.folders for d in file_dialects() if d.folders is not None]
    return [*CHECKPOINT_FILES, *(name for f in folders for name in storage.names_in_folders(directory, f))]


def _identity(directory: Path) -> list[tuple[str, int, int]]:
    """Changes when a save replaces any file, which is always by a new one: (name, inode, time in nanoseconds)."""
    found = []
    for name in _names(directory):
        with contextlib.suppress(OSError):
            status = (directory / name).stat()
            found.append((name, status.st_ino, status.st_mtime_ns))
    return found


def _check_digest(
    path: Path, config: MoeLoraConfig, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """PEFT writes no digest, so it is optional; when there is one it must be right."""
    if "format_version" in metadata and DIGEST not in metadata:
        problem = f"header metadata: found {metadata}, expected {DIGEST!r} beside 'format_version'"
        raise CheckpointError(f"{path} is damaged", [problem])
    if DIGEST in metadata and metadata[DIGEST] != (found := digest(config.semantic_dict(), tensors, metadata)):
        problem = f"digest: the file says {metadata[DIGEST]}, its config and tensors give {found}"
        raise CheckpointError(f"{path} is damaged, or its two files do not belong together", [problem])


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str = "native",
    dialect: str | None = None,
    allow_loss: Collection[str] = (),
    duplicates: bool = False,
    **options: Any,
) -> None:
    """Reads `source` (layout `dialect`, or detected; options as for `read`) and writes it to `target` in layout `to`.

    One tensor is in memory at a time, except with .bin and .npz files, which are read and written as a whole.
    `allow_loss` and `duplicates` as for `write`.

    Raises:
        CheckpointError, ConfigError: unreadable, or the target layout cannot express something.
    """
    with opened(source, dialect, **options) as adapter:
        write(adapter, target, to, allow_loss=allow_loss, duplicates=duplicates)
