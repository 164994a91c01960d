"""What a run that goes on beyond its end has different from one that had the new length from the beginning."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_lora_jax.train.optimizer import warmup_cosine
from moe_lora_jax.train.settings import TrainSettings


def extension(settings: TrainSettings, before: Mapping[str, Any], rows: int, step: int) -> str:
    """One sentence: the learning rate on both sides of the border, and rows that the border leaves out.

    Args:
        settings: of the continuation.
        before: those of them that were different.
        rows: of the training data; examples, unless they are packed.
        step: the last one before the border.
    """
    earlier = dataclasses.replace(settings, **before)
    old, new = earlier.total_steps(rows), settings.total_steps(rows)
    text = f"extended from {old} to {new} steps, after step {step}"
    if 0 < step < new:
        last, following = (
            float(warmup_cosine(settings.learning_rate, settings.warmup_steps, total)(index))
            for total, index in ((old, step - 1), (new, step))
        )
        text += f": the learning rate, {last:.3g} there, is from now on that of a run of {new} steps, {following:.3g}"
    taken = settings.batch_size * settings.gradient_accumulation
    missed = step * taken - earlier.epochs * rows if earlier.steps is None else 0
    if missed > 0:
        what = "rows" if settings.packing else "examples"
        text += f"; step {step} was {missed} {what} short, which the next epoch leaves out"
    return text
