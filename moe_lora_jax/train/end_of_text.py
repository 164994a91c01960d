"""Where a text ends: for `generate`, and beside an adapter for whoever serves it."""

import json
from pathlib import Path
from typing import Any

from moe_lora_interop.checkpoint.card import GENERATION_CONFIG, end_ids_beside
from moe_lora_interop.disk.atomic import replace_file
from moe_lora_jax.train.errors import BadLine
from moe_lora_jax.train.template import ChatTemplate


def end_ids(model: Any, tokenizer: Any, adapter: Path | None = None) -> list[int]:
    """The ids that end a text: those that the model's config states (generation_config.json wins over config.json), the
    one that training puts at the end, the one with which the chat template closes an assistant's turn, and those that a
    training wrote beside the adapter.
    """
    try:
        closing = ChatTemplate(tokenizer).end_token
    except BadLine:  # there is no template
        closing = None
    beside = [] if adapter is None else end_ids_beside(adapter)
    return sorted({*model.config.eos_token_id, tokenizer.eos_token_id, closing, *beside} - {None})


def write_end_ids(directory: Path, model: Any, tokenizer: Any) -> None:
    """Writes generation_config.json beside an adapter, if its texts end at other ids than those of the base model."""
    found = end_ids(model, tokenizer)
    if not set(found) <= set(model.config.eos_token_id) and not (directory / GENERATION_CONFIG).exists():
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / GENERATION_CONFIG, (json.dumps({"eos_token_id": found}, indent=2) + "\n").encode())
