"""Ordinary LoRA adapters as the experts of a mixture, straight onto a model."""

import os
from collections.abc import Sequence
from typing import Any

from flax import nnx

from interop.combine import combine as combine_adapters
from moe_lora_jax.checkpoint import load_adapter


def combine(
    model: nnx.Module, directories: Sequence[str | os.PathLike[str]], *, rngs: nnx.Rngs | None = None, **options: Any
) -> nnx.Module:
    """Puts a mixture of the LoRA adapters in `directories` on a base model, in place, and returns the model.

    Args:
        model: a base model without an adapter.
        directories: ordinary PEFT LoRA directories, two or more; each is an expert.
        rngs: stream "dropout", for training on; default `nnx.Rngs(0)`.
        options: router, top_k, seed, ...: as for `interop.combine.combine`.

    Raises:
        CheckpointError, ConfigError: as there, and as `load_adapter` does.
    """
    return load_adapter(model, combine_adapters(directories, **options), rngs=rngs)
