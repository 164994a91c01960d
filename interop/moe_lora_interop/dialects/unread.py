"""Layouts of other programs that are known and not read: errors name them, so that nobody tries another reader."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_lora_interop.disk import files
from moe_lora_interop.errors import CheckpointError, ConfigError


class Unread(NamedTuple):
    """A program, and a mark that only its directories have: a peft_type, a file, or a key's end in a file of PEFT's
    names."""

    name: str
    source: str
    peft_type: str = ""
    file: str = ""
    key: str = ""


UNREAD = (
    Unread("CoIN", "zackschen/CoIN", peft_type="MOE_LORA_CoIN"),
    Unread("CoMoL", "DCDmllm/CoMoL", peft_type="MoCoreLORA"),
    Unread("MeteoRA", "NJUDeepEngine/meteora", key=".moe_gate.weight"),
    Unread("MTL-LoRA", "pUmpKin-Co/MTL-LoRA", file="checkpoint/final_checkpoint.pt"),
    Unread("X-LoRA's own program", "EricLBuehler/xlora; PEFT's X-LoRA is read", file="xlora_config.json"),
)


def unread_layout(directory: Path) -> str:
    """A sentence that names the program that wrote this directory, if it is one of `UNREAD`; or ""."""
    config = _or(files.read_json, directory / files.CONFIG_NAME, {})
    starts = b"".join(_or(_start, directory / name, b"") for name in (files.WEIGHTS_NAME, "model.safetensors"))
    for row in UNREAD:
        if (
            (row.peft_type and config.get("peft_type") == row.peft_type)
            or (row.file and (directory / row.file).is_file())
            or (row.key and re.search(rb'"base_model\.[^"]*' + re.escape(row.key.encode()) + rb'"', starts))
        ):
            return f"written by {row.name} ({row.source}), whose layout is not read; no other layout is right for it"
    return ""


@contextlib.contextmanager
def naming_unread(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Errors about this directory begin with `unread_layout`."""
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        reason = unread_layout(Path(directory))
        if not reason:
            raise
        raise type(error)(error.what, [reason, *error.problems]) from None


def _start(path: Path) -> bytes:
    """Enough of a header for the keys of the first layer, without parsing a long one once more."""
    with files.opened(path, "safetensors file") as file:
        return file.read(2**16)


def _or(read: Callable[[Path], Any], path: Path, otherwise: Any) -> Any:
    try:
        return read(path)
    except (CheckpointError, OSError):
        return otherwise
