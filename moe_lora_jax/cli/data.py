"""`moe-lora data`: what `moe-lora train` would make of a data file, and which tokens its loss would count."""

from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.text import Text

from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.disk.files import read_json
from moe_lora_interop.disk.hub import tokenizer_directory
from moe_lora_interop.errors import ConfigError, printable
from moe_lora_jax.train.data import TokenData, read_data
from moe_lora_jax.train.examples import Examples
from moe_lora_jax.train.tokenizer import load_tokenizer, pieces

OPEN, CLOSE = "⟦", "⟧"


def data(
    file: Annotated[Path, tyro.conf.Positional],
    *,
    model: Path,
    revision: str | None = None,
    max_length: int = 512,
    chat_template: Path | None = None,
    show: int = 3,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what `train` makes of a data file: lengths, and examples with the tokens that count marked.

    Args:
        file: As for `train --data`.
        model: Hugging Face model directory with the tokenizer, or an id on the Hub; its weights are not read.
        revision: Branch, tag or commit of an id.
        max_length: Tokens; longer examples are cut.
        chat_template: A file with a Jinja template for messages, instead of the tokenizer's own.
        show: How many examples to print, from the first on.
    """
    if show < 0:
        raise ConfigError("invalid arguments", [f"show: found {show}, expected an integer >= 0"])
    shell = Shell(quiet=quiet, json=json)
    with shell.progress("reading"):
        model = tokenizer_directory(model, revision)
        tokenizer = load_tokenizer(model, chat_template)
        vocabulary = read_json(model / "config.json").get("vocab_size")
        found = read_data(file, tokenizer, max_length=max_length, vocab_size=vocabulary)
    shown: list[dict[str, Any]] = [
        {"line": e.line, "tokens": len(e.ids), "parts": list(parts(tokenizer, e.ids, e.counted))}
        for e in islice(found.examples, show)
    ]
    lengths = quartiles(found)
    shell.give({"summary": found.describe(), "lengths": lengths, "examples": shown})
    if json:
        return
    print(printable(found.describe()))
    print("tokens of an example: " + ", ".join(f"{name} {value:,}" for name, value in lengths.items()))
    if shown:
        shell.say(f"{OPEN}...{CLOSE} carries the loss:")
    console = Console(soft_wrap=True)
    for example in shown:
        console.print(f"\nline {example['line']}, {example['tokens']} tokens", style="bold", highlight=False)
        text = Text()
        for part in example["parts"]:
            clean = "\n".join(printable(line) for line in part["text"].split("\n"))
            text.append(*((f"{OPEN}{clean}{CLOSE}", "green") if part["loss"] else (clean, "")))
        console.print(text, highlight=False)


def parts(tokenizer: Any, ids: np.ndarray, counted: np.ndarray) -> Iterator[dict[str, Any]]:
    """Runs of tokens that carry the loss or do not: {"loss", "text", "ids"}. The first token never does."""
    carries = [False, *map(bool, counted[1:])]
    tokens = zip(carries, pieces(tokenizer, ids.tolist()), ids.tolist(), strict=True)
    for loss, run in groupby(tokens, key=lambda token: token[0]):
        _, texts, numbers = zip(*run, strict=True)
        yield {"loss": loss, "text": "".join(texts), "ids": list(numbers)}


def quartiles(found: TokenData) -> dict[str, int]:
    """Of the examples' lengths."""
    lengths = Examples.of(found.examples).lengths
    shares = {"shortest": 0, "half up to": 0.5, "nine tenths up to": 0.9, "longest": 1}
    return {name: int(np.quantile(lengths, share, method="nearest")) for name, share in shares.items()}
