"""The PEFT twin of `moe_lora_interop.MoeLoraConfig`: the same fields and defaults, which exist only there."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from moe_lora_interop.checkpoint.card import CARD_NAME, new_card
from moe_lora_interop.config import adapter_config as neutral_config
from moe_lora_interop.disk.files import WEIGHTS_NAME, read_header

_NEUTRAL = neutral_config.MoeLoraConfig

# PEFT's own base class declares some of these fields (task_type, ...) already; a keyword-only redeclaration replaces
# its default and keeps everything else.
_Fields = dataclasses.make_dataclass(
    "_Fields",
    [
        (f.name, f.type, dataclasses.field(default=f.default, default_factory=f.default_factory, kw_only=True))
        for f in dataclasses.fields(_NEUTRAL)
    ],
    bases=(PeftConfig,),
)


class MoeLoraConfig(_Fields):  # type: ignore[misc, valid-type]
    """Configuration of a MOE_LORA adapter for PEFT. `moe_lora_interop.MoeLoraConfig` documents the fields.

    PEFT changes its configs while it works (target_modules, inference_mode, ...), so this one is mutable; `neutral`
    is the frozen, validated one, and every use goes through it.

    Raises:
        moe_lora_interop.ConfigError: a wrong value, a field that this version does not know (unless it is null), or a
            newer format_version. PEFT itself only warns of unknown fields and drops them.
    """

    def __init__(self, **fields: Any):
        known = _NEUTRAL.from_dict({"format_version": neutral_config.FORMAT_VERSION, **fields})
        super().__init__(**{f.name: getattr(known, f.name) for f in dataclasses.fields(known)})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(neutral_config.PEFT_TYPE)
        for name in ("target_modules", "exclude_modules"):  # PEFT looks names up in sets
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)

    @property
    def neutral(self) -> neutral_config.MoeLoraConfig:
        """The same values as an `moe_lora_interop.MoeLoraConfig`, validated anew."""
        return _NEUTRAL(**{f.name: getattr(self, f.name) for f in dataclasses.fields(_NEUTRAL) if f.init})

    def to_dict(self) -> dict[str, Any]:
        """What save_pretrained writes: the neutral config's JSON, so that both frameworks write the same file."""
        return self.neutral.to_dict()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes adapter_config.json, and the model card in the place of PEFT's placeholder: it has the import line."""
        super().save_pretrained(save_directory, **kwargs)
        directory = Path(save_directory)
        weights = directory / WEIGHTS_NAME
        infos = read_header(weights)[0] if weights.exists() else {}
        card = new_card(directory, self.neutral, infos)
        if card is not None:
            (directory / CARD_NAME).write_text(card, "utf-8", errors="replace")

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """PEFT calls this with the parsed adapter_config.json: a file, unlike a call, must state its format_version."""
        _NEUTRAL.from_dict(kwargs)
        return super().check_kwargs(**kwargs)


# help() and editors show the fields, although __init__ takes them as **fields to name the unknown ones itself
MoeLoraConfig.__signature__ = inspect.signature(_Fields)  # type: ignore[attr-defined]
