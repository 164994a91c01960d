"""What a run that goes on beyond its end has different from one that had the new length from the beginning."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_lora_jax.train.optimizer import warmup_cosine
from moe_lora_jax.train.settings import TrainSettings


def extension(settings: TrainSettings, before: Mapping[str, Any], examples: int, step: int) -> str:
    """One sentence: the learning rate on both sides of the border, and examples that the border leaves out.

    Args:
        settings: of the continuation.
        before: those of them that were different.
        examples: of the training data.
        step: the last one before the border.
    """
    earlier = dataclasses.replace(settings, **before)
    old, new = earlier.total_steps(examples), settings.total_steps(examples)
    text = f"extended from {old} to {new} steps, after step {step}"
    if 0 < step < new:
        last, following = (
            float(warmup_cosine(settings.learning_rate, settings.warmup_steps, total)(index))
            for total, index in ((old, step - 1), (new, step))
        )
        text += f": the learning rate, {last:.3g} there, is from now on that of a run of {new} steps, {following:.3g}"
    rows = settings.batch_size * settings.gradient_accumulation
    missed = step * rows - earlier.epochs * examples if earlier.steps is None else 0
    if missed > 0:
        text += f"; step {step} was {missed} examples short, which the next epoch leaves out"
    return text
