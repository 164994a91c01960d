"""Which layout a directory is in."""

import os
from collections.abc import Mapping
from typing import Any

from moe_lora_interop.checkpoint.directory import WEIGHTS_NAMES, Directory
from moe_lora_interop.dialects.registry import dialect_named, file_dialects
from moe_lora_interop.disk import files
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.rules.configs import refusals
from moe_lora_interop.rules.dialect import Dialect


def detect(directory: str | os.PathLike[str]) -> str:
    """The name of the one layout that describes every tensor and the config in `directory`.

    Raises:
        CheckpointError: none or several fit; each candidate is listed with the reason.
    """
    with Directory(directory) as found:
        return _detected(found, {}).name


def dialect_of(directory: Directory, name: str | None, options: Mapping[str, Any]) -> Dialect:
    """The layout of this name; if there is none, the one whose own config it is, or else the one that `detect` finds.

    Raises:
        CheckpointError: as `detect`, or there is no layout of this name.
    """
    if name is not None:
        return dialect_named(name)
    peft_type = (directory.config() or {}).get("peft_type")
    own = (d for d in file_dialects() if d.own_config and peft_type in d.const["peft_type"])
    return next(own, None) or _detected(directory, options)


def _detected(directory: Directory, options: Mapping[str, Any]) -> Dialect:
    known = file_dialects()
    in_folders = [d for d in known if d.folders is not None and directory.names_experts(d.folders)]
    own_file = [d for d in known if d.has_own_file and directory.has(d.weights)]
    if not in_folders and not any(map(directory.has, WEIGHTS_NAMES)):
        candidates = own_file
    else:
        candidates = in_folders or [d for d in known if d.folders is None and not d.has_own_file]
    reasons: dict[str, list[str]] = {}
    for dialect in candidates:
        stored = directory.stored(dialect if dialect.folders is not None or dialect.has_own_file else None, options)
        shapes = {name: info.shape for name, info in stored.infos.items()}
        if not dialect.has_own_file or dialect.claims_any(shapes):  # model.safetensors is mostly a model
            reasons[dialect.name] = dialect.misfits(shapes, stored.raw)
    fitting = [d for d in candidates if reasons.get(d.name) == []]
    if len(fitting) == 1:
        return fitting[0]
    if not reasons:
        directory.stored()  # says what is missing
    config = directory.path / files.CONFIG_NAME
    if not fitting and not in_folders and candidates is not own_file and not config.exists():
        raise CheckpointError("not a checkpoint", [f"{config}: missing file"])
    problems = [f"{name}: {'; '.join(reason) or 'fits'}" for name, reason in reasons.items()]
    problems += [d.hint for d in in_folders if d.hint]
    if fitting:
        raise CheckpointError(f"{directory.path} fits several layouts, name one", problems)
    raise CheckpointError(f"{directory.path} is in no known layout", [*refusals(directory.config() or {}), *problems])
