"""The tokenizer in a model directory, and the tokens that training and generation must agree on."""

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_lora_interop.disk.atomic import replace_file
from moe_lora_interop.disk.files import CONFIG_NAME, opened
from moe_lora_interop.errors import CheckpointError


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """The tokenizer in a model directory (transformers' AutoTokenizer, offline).

    Raises:
        CheckpointError: no such directory, no tokenizer in it, or it cannot be read.
    """
    if not Path(directory).is_dir():
        hint = f"models are read from local directories; to fetch one: hf download {directory} --local-dir DIR"
        raise CheckpointError("no such model", [f"{directory}: not a directory", hint])
    if Path(directory, CONFIG_NAME).is_file() and not Path(directory, "config.json").is_file():
        raise CheckpointError("no model", [f"{directory} is an adapter's directory, expected a model's"])
    known = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if not any(Path(directory, name).is_file() for name in known):
        raise CheckpointError(f"no tokenizer in {directory}", [f"expected {' or '.join(known)} beside config.json"])
    _refuse_unreadable(Path(directory), known)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read the tokenizer in {directory}", [str(error)]) from error


def save_tokenizer(tokenizer: Any, directory: str | os.PathLike[str]) -> None:
    """Writes the tokenizer beside an adapter, as PEFT's and TRL's trainers do; files that are there stay."""
    with tempfile.TemporaryDirectory() as made:
        tokenizer.save_pretrained(made)
        for path in Path(made).rglob("*"):
            target = Path(directory) / path.relative_to(made)
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                replace_file(target, path.read_bytes())


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt that is to be continued: with the special tokens in front, without an end token behind."""
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a text: those that the model's config states, and the one that training puts at the end."""
    return sorted({*model.config.eos_token_id, tokenizer.eos_token_id} - {None})


def _refuse_unreadable(directory: Path, names: Sequence[str]) -> None:
    """Says what a file is where transformers would ask for a library that reads something else."""
    starts = {}
    for name in names:
        if (directory / name).is_file():
            with opened(directory / name, "tokenizer") as file:
                starts[name] = file.read(1)
    is_sentencepiece = starts.get("tokenizer.model") == b"\n"  # the tag of a protobuf's first field; tiktoken's is text
    if is_sentencepiece and "tokenizer.json" not in starts and importlib.util.find_spec("sentencepiece") is None:
        problem = (
            "found tokenizer.model, which is SentencePiece's, and no tokenizer.json: pip install sentencepiece "
            "protobuf, or where these are, write one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
        raise CheckpointError(f"cannot read the tokenizer in {directory}", [problem])
