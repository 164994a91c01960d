"""Adapters in directories: read any layout, write any."""

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter, config_sizes
from moe_lora_interop.checkpoint.base_tensors import warn_of_base_tensors
from moe_lora_interop.checkpoint.card import CARD_NAME, new_card
from moe_lora_interop.checkpoint.directory import Directory
from moe_lora_interop.checkpoint.reading import OpenAdapter, Reading
from moe_lora_interop.checkpoint.store import checkpoint_files, store
from moe_lora_interop.dialects.registry import dialect_named, file_dialects
from moe_lora_interop.disk.atomic import PREVIOUS, is_being_replaced, replace_files
from moe_lora_interop.disk.digest import begun
from moe_lora_interop.disk.dtypes import STORED
from moe_lora_interop.disk.files import TensorInfo
from moe_lora_interop.disk.hub import adapter_directory
from moe_lora_interop.disk.lazy import Tensor
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_interop.rules.configs import config_of, differences, options_of, raw_of
from moe_lora_interop.rules.dialect import Dialect
from moe_lora_interop.rules.tensors import encode

RETRIES = 5
Result = TypeVar("Result")


def read(
    directory: str | os.PathLike[str], layout: str | None = None, *, revision: str | None = None, **options: Any
) -> Adapter:
    """Reads an adapter.

    Args:
        directory: the checkpoint, or its id on the Hugging Face Hub, "owner/name" (extra `hub`).
        layout: the layout's name; None detects it from the tensors' names and the config.
        revision: branch, tag or commit of an id.
        options: what the layout does not record (`moe-lora layouts` lists them).

    Raises:
        CheckpointError, ConfigError: with every problem found.

    Warns:
        UserWarning: the file also holds tensors of the base model (`Adapter.base_tensors`), which nothing was compared
            with. `mlj.load_adapter` compares them with the model, `verify` with a directory.
    """
    adapter = read_with_base(adapter_directory(directory, revision), layout, **options)
    warn_of_base_tensors(os.fspath(directory), adapter.base_tensors)
    return adapter


def read_with_base(directory: str | os.PathLike[str], layout: str | None = None, **options: Any) -> Adapter:
    """`read` for callers that compare the adapter's `base_tensors` with a base model themselves."""
    with opened(directory, layout, **options) as adapter:
        of_base = _in_memory(adapter.base_tensors)
        return Adapter(adapter.config, _in_memory(adapter.tensors), base_tensors=of_base)


def _in_memory(tensors: Mapping[Any, Tensor]) -> dict[Any, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


@contextlib.contextmanager
def opened(directory: str | os.PathLike[str], layout: str | None = None, **options: Any) -> Iterator[OpenAdapter]:
    """The adapter that `read` reads, checked as there, but its tensors are read when asked for (`disk.lazy`).

    The files stay open within the context, so that a save in the meantime changes nothing.
    """
    with between_saves(directory, layout, options, Reading.adapter) as adapter:
        yield adapter


@contextlib.contextmanager
def between_saves(
    path: str | os.PathLike[str], layout: str | None, options: Mapping[str, Any], look: Callable[[Reading], Result]
) -> Iterator[Result]:
    """What `look` finds in a directory, all of it of one save, although another process may be saving there.

    Raises:
        CheckpointError: a save was interrupted, or goes on for too long.
    """
    path = adapter_directory(path)
    for attempt in range(RETRIES):
        with Directory(path) as directory:
            try:
                reading = Reading(directory, layout, options)
                found = look(reading)
            except (CheckpointError, ConfigError):
                # asked in this order, a save that ends between the two questions has changed something
                if not is_being_replaced(directory.path) and directory.unchanged():
                    raise
            else:
                if (reading.has_digest or not is_being_replaced(directory.path)) and directory.unchanged():
                    yield found
                    return
        time.sleep(0.05 * 2**attempt)
    problem = f"what was there before is complete in {Path(path) / PREVIOUS}; saving again also puts it in order"
    raise CheckpointError(f"a save into {path} was interrupted, or is still going on", [problem])


def write(
    adapter: Adapter,
    directory: str | os.PathLike[str],
    layout: str = "native",
    *,
    allow_loss: Collection[str] = (),
    duplicates: bool = False,
) -> None:
    """Writes an adapter, and a model card unless the directory has a README.md already.

    Args:
        adapter: what to write.
        directory: created if missing; an older checkpoint in it is replaced as a whole.
        layout: the layout's name.
        allow_loss: config fields that may be lost because the layout cannot express them.
        duplicates: also write the tensors that a layout's own program stores twice.

    Raises:
        CheckpointError: the layout cannot hold something, or the disk refuses; the old checkpoint is then intact.
        ConfigError: the layout cannot express a config field that is not in `allow_loss`.

    Warns:
        UserWarning: the adapter came with tensors of its base model (`Adapter.base_tensors`), which are not written.
    """
    warn_of_base_tensors(os.fspath(directory), adapter.base_tensors)
    table, config = dialect_named(layout), adapter.config
    if table.read_only:
        raise CheckpointError(f"{layout} is read and not written", [f"layout {layout!r}: {table.read_only}"])
    raw = _raw_config(table, adapter, allow_loss)
    rules = table.specialised(raw).rules
    tensors, problems = encode(rules, adapter.tensors, config_sizes(config), duplicates=duplicates)
    if problems:
        raise CheckpointError(f"cannot be written as {layout}", problems)
    writers = {}
    target = Path(directory)
    if table.has_own_file and (target / "config.json").exists():  # its file is called as a model's is
        raise CheckpointError(f"{target} is a model's directory", [f"{target / table.weights}: expected another place"])
    if table.card:
        card = new_card(target, config, {n: TensorInfo(STORED[t.dtype.name], t.shape) for n, t in tensors.items()})
        if card is not None:
            writers[CARD_NAME] = lambda p: p.write_text(card, "utf-8", errors="replace")
    state = begun(config.semantic_dict(), tensors, table.header(raw)) if table.signed else None
    writers |= store(table, raw, tensors, state)
    replace_files(target, writers, stale=checkpoint_files(target, file_dialects()))


def _raw_config(table: Dialect, adapter: Adapter, allow_loss: Collection[str]) -> dict[str, Any]:
    """The layout's config for ours, checked by reading it back: what comes back different cannot be expressed."""
    config, modules = adapter.config, adapter.modules
    raw = raw_of(table, config, adapter.tensors, modules)
    try:
        back = config_of(table, raw, adapter.tensors, options_of(table, config, modules))
    except ConfigError as error:
        raise ConfigError(f"layout {table.name!r} cannot express the config", error.problems) from None
    lost = {n: found for n, found in differences(config, back, modules).items() if n not in allow_loss}
    if lost:
        problems = [f"{n}: {mine!r} would be read back as {theirs!r}" for n, (mine, theirs) in lost.items()]
        what = f"layout {table.name!r} cannot express the config (--allow-loss, allow_loss: what may be lost)"
        raise ConfigError(what, problems)
    return raw


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str = "native",
    layout: str | None = None,
    allow_loss: Collection[str] = (),
    duplicates: bool = False,
    **options: Any,
) -> None:
    """Reads `source` (layout `layout`, or detected; options as for `read`) and writes it to `target` in layout `to`.

    One tensor is in memory at a time, except with .bin and .npz files, which are read and written as a whole.
    `allow_loss` and `duplicates` as for `write`.

    Raises:
        CheckpointError, ConfigError: unreadable, or the target layout cannot express something.
    """
    with opened(source, layout, **options) as adapter:
        write(adapter, target, to, allow_loss=allow_loss, duplicates=duplicates)
