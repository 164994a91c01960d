"""Tensors of the base model that PEFT puts into an adapter's file: of embeddings and heads, targeted or resized.

They are no part of the adapter. Where a base model is at hand they are compared with it: equal, they say nothing new;
other values or shapes are trained or resized rows, which only PyTorch can use.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from moe_lora_interop.rules.tensors import Rule, claim

PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out")  # transformers' names


def _rules() -> Iterator[Rule]:
    for parameter, axes in (("weight", "out in"), ("bias", "out")):
        keys = [f"{PREFIX}{{module}}.base_layer.{parameter}"]
        keys += [f"{PREFIX}{path}{name}.{parameter}" for name in EMBEDDINGS for path in ("", "{module}.")]
        yield from (Rule(f"base_{parameter}", key, axes, canonical_axes=axes, copy="base") for key in keys)


BASE_TENSORS = tuple(_rules())


def base_tensors(rules: Sequence[Rule], stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{name below `PREFIX`: tensor} of those among `stored`. "X.base_layer.weight" is called "X.weight" in the base."""
    found = {key: claim(rules, key, tensor.ndim) for key, tensor in stored.items()}
    return {key.removeprefix(PREFIX): stored[key] for key, rule in found.items() if rule and rule.copy == "base"}


def name_in_base(name: str) -> str:
    """What the base model calls a tensor that `base_tensors` gave."""
    return name.replace(".base_layer.", ".")


def whole_modules(names: Iterable[str], keys: Iterable[str]) -> list[str]:
    """Of stored keys, the parameters of modules that `modules_to_save` (`names`) has trained as a whole."""
    patterns = [re.compile(rf"{re.escape(PREFIX)}(.*\.)?{re.escape(name)}\..*", re.DOTALL) for name in names]
    return [key for key in keys if any(pattern.fullmatch(key) for pattern in patterns)]
