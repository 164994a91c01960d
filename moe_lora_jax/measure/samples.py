"""What a model answers to some prompts, to read."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_lora_interop.errors import ConfigError
from moe_lora_jax.models import CausalLM, generate
from moe_lora_jax.train.data import TokenData
from moe_lora_jax.train.end_of_text import end_ids
from moe_lora_jax.train.errors import BadLine
from moe_lora_jax.train.messages import check_text
from moe_lora_jax.train.tokenizer import prompt_ids


class Prompt(NamedTuple):
    """ids: the tokens to continue. expected: those of the answer in the data, with its end token; empty if unknown."""

    ids: list[int]
    expected: list[int]


def prompts_of(topics: Mapping[str, TokenData], count: int) -> list[Prompt]:
    """The first prompts of the data, of every topic in turn. An example with loss from its start has no prompt."""

    def in_turn() -> Iterator[Prompt]:
        with_prompt = ([e for e in data.examples if not e.counted[0]] for data in topics.values())
        for examples in zip_longest(*with_prompt):
            for e in examples:
                if e is not None:
                    start = int(e.counted.argmax())
                    yield Prompt(e.ids[:start].tolist(), e.ids[start:][e.counted[start:]].tolist())

    return list(islice(in_turn(), count))


def prompts_of_texts(tokenizer: Any, texts: Sequence[str]) -> list[Prompt]:
    """Prompts of one's own.

    Raises:
        ConfigError: a text has no tokens, or is no text in UTF-8; each is listed.
    """
    made, problems = [], []
    for text in texts:
        try:
            check_text(text)
            made.append(Prompt(prompt_ids(tokenizer, text), []))
        except BadLine as bad:
            problems.append(f"prompt: {bad}")
    problems += ["prompt: found no tokens, expected at least one" for prompt in made if not prompt.ids]
    if problems:
        raise ConfigError("nothing to continue", problems)
    return made


def answers(
    model: CausalLM,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    adapter: Path | None = None,
) -> list[str]:
    """Greedy continuations as text, without special tokens.

    Args:
        prompts: token ids, each at least one.
        adapter: the directory of the model's adapter, for the tokens that end a text written there.
    """
    ids = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    tokens = generate(
        model,
        jnp.asarray(ids),
        jnp.asarray(mask),
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids(model, tokenizer, adapter),
    )
    return [tokenizer.decode(row, skip_special_tokens=True) for row in tokens[:, ids.shape[1] :].tolist()]
