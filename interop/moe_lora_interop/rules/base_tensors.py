"""Tensors of the base model in an adapter's file: PEFT puts embeddings and heads there, targeted or resized, and some
programs the whole model.

They are no part of the adapter. Where a base model is at hand they are compared with it: equal, they say nothing new;
other values or shapes are trained or resized rows, which only PyTorch can use.
"""

import re
from collections.abc import Iterable, Iterator

from moe_lora_interop.disk.lazy import Tensor
from moe_lora_interop.rules.tensors import ByRule, Rule

PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out")  # transformers' names


def _rules() -> Iterator[Rule]:
    for parameter, axes in (("weight", "out in"), ("bias", "out")):
        keys = [f"{PREFIX}{{module}}.base_layer.{parameter}"]
        keys += [f"{PREFIX}{path}{name}.{parameter}" for name in EMBEDDINGS for path in ("", "{module}.")]
        yield from (Rule(f"base_{parameter}", key, axes, canonical_axes=axes, copy="base") for key in keys)


BASE_TENSORS = tuple(_rules())


def base_tensors(by_rule: ByRule) -> dict[str, Tensor]:
    """{name below `PREFIX`: tensor} of those that such a rule claimed. "X.base_layer.weight" is "X.weight" there."""
    found = (tensors for rule, tensors in by_rule.items() if rule.copy == "base")
    return {below_prefix(key): tensor for tensors in found for key, tensor in tensors.items()}


def below_prefix(key: str) -> str:
    """A stored key without what stands before every module's path."""
    return key.removeprefix("main/").removeprefix(PREFIX)


def name_in_base(name: str) -> str:
    """What the base model calls a tensor that `base_tensors` gave."""
    return name.replace(".base_layer.", ".")


def whole_modules(names: Iterable[str], keys: Iterable[str]) -> list[str]:
    """Of stored keys, the parameters of modules that `modules_to_save` (`names`) has trained as a whole."""
    patterns = [re.compile(rf"{re.escape(PREFIX)}(.*\.)?{re.escape(name)}\..*", re.DOTALL) for name in names]
    return [key for key in keys if any(pattern.fullmatch(key) for pattern in patterns)]
