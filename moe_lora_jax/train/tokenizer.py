"""The tokenizer in a model directory, and the tokens that training and generation must agree on."""

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_lora_interop.disk.atomic import replace_file
from moe_lora_interop.disk.files import CONFIG_NAME, opened
from moe_lora_interop.disk.hub import tokenizer_directory
from moe_lora_interop.errors import CheckpointError


def load_tokenizer(
    directory: str | os.PathLike[str],
    chat_template: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
) -> Any:
    """The tokenizer in a model directory (transformers' AutoTokenizer, which asks nobody).

    Args:
        directory: a model's, or its id on the Hugging Face Hub.
        chat_template: a file with a Jinja template, instead of the tokenizer's own.
        revision: branch, tag or commit of an id.

    Raises:
        CheckpointError: no such directory, no tokenizer in it, or it or the template cannot be read.
    """
    template = None if chat_template is None else _read_template(Path(chat_template))
    directory = tokenizer_directory(directory, revision)
    if not directory.is_dir():
        raise CheckpointError("no such model", [f"{directory}: not a directory"])
    if Path(directory, CONFIG_NAME).is_file() and not Path(directory, "config.json").is_file():
        raise CheckpointError("no model", [f"{directory} is an adapter's directory, expected a model's"])
    known = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if not any(Path(directory, name).is_file() for name in known):
        raise CheckpointError(f"no tokenizer in {directory}", [f"expected {' or '.join(known)} beside config.json"])
    _refuse_unreadable(Path(directory), known)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read the tokenizer in {directory}", [str(error)]) from error
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, with the special tokens that the tokenizer adds, but none that the text has there already."""
    front, ids, back = _parts(tokenizer, text)
    return front + ids + back


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text; a token that ends inside a character adds nothing."""
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        after = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if after.endswith("\ufffd") and end < len(ids):  # half a character
            found.append("")
        elif after.startswith(before):
            found.append(after[len(before) :])
            before = after
        else:  # this tokenizer changes what came before
            found.append(str(tokenizer.convert_ids_to_tokens(ids[end - 1])))
            before = after
    return found


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
    """The same of a prompt that is to be continued: without the end token that some tokenizers put behind."""
    front, ids, back = _parts(tokenizer, prompt)
    return front + ids + (back[:-1] if back[-1:] == [tokenizer.eos_token_id] else back)


def bare_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text alone: its own special tokens, and none that the tokenizer adds."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def pad_id(tokenizer: Any, vocab_size: int) -> int:
    """The id for padding, which is masked: the tokenizer's if the model has a row for it, otherwise 0."""
    found = tokenizer.pad_token_id
    return found if found is not None and 0 <= found < vocab_size else 0


def _parts(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
    """What the tokenizer adds in front, the text's own tokens, and what is added behind, without what would double."""
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    own = bare_ids(tokenizer, text)
    # the mask marks the added tokens alone in a tokenizer of the Rust library, all special tokens in one in Python
    start = added.index(0) if 0 in added else len(ids)
    if ids[start : start + len(own)] != own:
        start = next((k for k in range(len(ids) - len(own) + 1) if ids[k : k + len(own)] == own), 0)
    front, back = ids[:start], ids[start + len(own) :]
    if front and own[: len(front)] == front:
        front = []
    if back and own[-len(back) :] == back:
        back = []
    return front, own, back


def _read_template(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise CheckpointError("cannot read the chat template", [f"{path}: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise CheckpointError("cannot read the chat template", [f"{path}: not UTF-8 at byte {error.start}"]) from error


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
