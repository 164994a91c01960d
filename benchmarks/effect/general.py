"""Text that no adapter was trained on: what it does to the loss there is what fine-tuning made the model forget.

dialogue: English dialogues of chatterbot-corpus 1.3.3 (BSD-3-Clause). reference: Python's own language reference as it
comes with the interpreter (`pydoc_data.topics`, PSF licence).
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data import topics

import numpy as np
import yaml

from moe_lora_jax.train.data import Example

WINDOW, WINDOWS = 64, 24


def general_texts() -> dict[str, str]:
    """{source: text}."""
    (package,) = importlib.util.find_spec("chatterbot_corpus").submodule_search_locations  # type: ignore[union-attr]
    dialogues = []
    for file in sorted(Path(package, "data", "english").glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            dialogues.append("\n".join(map(str, turns)))
    reference = [topics.topics[topic] for topic in sorted(topics.topics)]
    return {"dialogue": "\n\n".join(dialogues), "reference": "\n\n".join(reference)}


def windows(text: str, encode: Callable[[str], Sequence[int]]) -> list[Example]:
    """WINDOWS pieces of WINDOW tokens, evenly spread over the text; every token but the first of a piece counts."""
    ids = np.array(encode(text), np.int32)
    starts = np.linspace(0, len(ids) - WINDOW, WINDOWS).astype(int)
    return [Example(ids[s : s + WINDOW], np.ones(WINDOW, bool), n + 1) for n, s in enumerate(starts)]
