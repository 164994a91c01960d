"""What a base model is called where others find it: its id on the Hugging Face Hub. A path means nothing elsewhere."""

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.disk.files import read_json
from moe_lora_interop.errors import CheckpointError

_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_ID = re.compile(rf"(?!.*(?:--|\.\.))(?!.*\.git$)(?:{_PART}/)?{_PART}", re.ASCII)
_CACHED = re.compile(r"(?:.*[/\\])?models--([^/\\]+)[/\\]snapshots[/\\]([^/\\]+)[/\\]?", re.DOTALL)


class HubName(NamedTuple):
    """owner/name, and the commit if it is known."""

    id: str
    revision: str | None = None


def hub_name(name: str) -> HubName | None:
    """The Hub's name of a base model: of an id itself, a folder of the Hub's cache, or a model's directory.

    The config.json of a directory may say what it was made from (`_name_or_path`). None if nothing says a name, or
    what says it cannot be read: no save fails for want of a name.
    """
    try:
        return _found(name)
    except (OSError, ValueError, CheckpointError):  # a path that cannot be looked at, or no model's
        return None


def _found(name: str) -> HubName | None:
    for path in (name, str(Path(name).resolve())):
        if (cached := _CACHED.fullmatch(path)) is not None and _is_id(found := cached[1].replace("--", "/")):
            return HubName(found, cached[2])
    config = Path(name, "config.json")
    if config.is_file():
        stated = read_json(config).get("_name_or_path")
        if isinstance(stated, str) and "/" in stated and not Path(stated).exists():
            return _found(stated)
        return None
    return HubName(name) if _is_id(name) and not Path(name).exists() else None


def hub_named(config: MoeLoraConfig) -> MoeLoraConfig:
    """The config with a base model's path replaced by the Hub's name, if it has one."""
    found = None if config.base_model_name_or_path is None else hub_name(config.base_model_name_or_path)
    return config if found is None else named(config, *found)


def named(config: MoeLoraConfig, base_name: str, revision: str | None = None) -> MoeLoraConfig:
    """The config for a base model of this name; what it says about the revision of another one is dropped."""
    if revision is None and base_name == config.base_model_name_or_path:
        revision = config.revision
    return replace(config, base_model_name_or_path=base_name, revision=revision)


def _is_id(name: str) -> bool:
    return _ID.fullmatch(name) is not None
