"""The settings of a training run: the single place of their defaults."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from moe_lora_interop.errors import ConfigError
from moe_lora_jax.adapters.filters import Part

Precision = Literal["default", "high", "highest"]
# What may differ between a run and its continuation: it changes what is shown or kept, not what is computed.
FREE = ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "save_best", "report_to", "resume")
BEFORE = {"matmul_precision": None, "loss_chunk": None, "packing": False}

Reporter = Literal["tensorboard", "wandb"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train. Every wrong value is named at construction.

    Args:
        epochs: passes over the data; the last batch of the last one may be smaller.
        steps: optimizer steps instead of epochs.
        batch_size: rows of one forward pass.
        gradient_accumulation: forward passes per optimizer step; the gradient is that of the joined batch.
        loss_chunk: tokens of a row whose logits exist at once; fewer need less memory, and change rounding only. None:
            as many as have fp32 logits of at most 256 MiB on a device.
        packing: fill rows with several examples, up to the max_length that the data were read with; batch_size and
            epochs then count rows. No example sees another, and their loss is the same; there is less padding.
        learning_rate: peak of AdamW's learning rate.
        warmup_steps: steps of linear warm-up; then cosine decay towards 0.
        weight_decay: of AdamW, decoupled.
        max_grad_norm: the gradient's global norm is clipped to this; None does not clip.
        train_only: "all", or only the "router" or the "experts" of the adapter.
        matmul_precision: of products of float32 numbers, in JAX's words: "default" (on TPUs rounded to bfloat16, on
            NVIDIA's GPUs to TF32), "high", "highest" (float32). None: "highest" for a base model in float32, else
            "default". Routers always compute in float32.
        seed: of the data order (the model's dropout streams have their own, in its rngs).
        eval_every: steps between evaluations; None evaluates before the first step and after the last only.
        checkpoint_every: steps between checkpoints, and between saves of the adapter; None writes both at the end only
            (and on SIGTERM or Ctrl-C).
        keep_checkpoints: how many; older ones are removed.
        save_best: after an evaluation with the lowest loss so far, also save the adapter into the folder `best`.
        log_every: steps between lines of metrics.jsonl.
        report_to: who gets the metrics too, with the settings and the command: tensorboard (events in
            training/tensorboard), wandb (extra `wandb`; W&B's environment variables hold).
        resume: continue the run in the output directory, with the same settings and data: bit-identical. With more
            steps or epochs it goes on beyond its end: from there on the learning rate is that of a run of the new
            length, so it rises first.

    Raises:
        ConfigError: with one entry per wrong field.
    """

    epochs: int = 1
    steps: int | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    loss_chunk: int | None = None
    packing: bool = False
    learning_rate: float = 2e-4
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    train_only: Part = "all"
    matmul_precision: Precision | None = None
    seed: int = 0
    eval_every: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    save_best: bool = False
    log_every: int = 10
    report_to: tuple[Reporter, ...] = ()
    resume: bool = False

    def __post_init__(self) -> None:
        problems = []
        for name in ("epochs", "steps", "batch_size", "gradient_accumulation", "loss_chunk", "eval_every",
                     "checkpoint_every", "keep_checkpoints", "log_every"):  # fmt: skip
            value = getattr(self, name)
            optional = name in ("steps", "loss_chunk", "eval_every", "checkpoint_every")
            if not (value is None and optional) and not (_is_integer(value) and value >= 1):
                problems.append(f"{name}: found {value!r}, expected {'null or ' if optional else ''}an integer >= 1")
        for name in ("warmup_steps", "seed"):
            if not (_is_integer(getattr(self, name)) and getattr(self, name) >= 0):
                problems.append(f"{name}: found {getattr(self, name)!r}, expected an integer >= 0")
        for name, positive, optional in (
            ("learning_rate", True, False), ("weight_decay", False, False), ("max_grad_norm", True, True)
        ):  # fmt: skip
            value = getattr(self, name)
            if not (value is None and optional) and not _is_number(value, positive):
                expected = f"{'null or ' if optional else ''}a finite number {'> 0' if positive else '>= 0'}"
                problems.append(f"{name}: found {value!r}, expected {expected}")
        if self.train_only not in get_args(Part):
            problems.append(f"train_only: found {self.train_only!r}, expected one of {', '.join(get_args(Part))}")
        if self.matmul_precision not in (None, *get_args(Precision)):
            expected = f"null or one of {', '.join(get_args(Precision))}"
            problems.append(f"matmul_precision: found {self.matmul_precision!r}, expected {expected}")
        if isinstance(self.report_to, str) or set(self.report_to) - set(get_args(Reporter)):
            names = ", ".join(get_args(Reporter))
            problems.append(f"report_to: found {self.report_to!r}, expected a list of some of {names}")
        if problems:
            raise ConfigError("invalid training settings", problems)

    def total_steps(self, rows: int) -> int:
        """Optimizer steps for this many rows: of examples, or with `packing` of `training_rows`."""
        taken = self.batch_size * self.gradient_accumulation
        return self.steps if self.steps is not None else -(-self.epochs * rows // taken)

    def total_epochs(self, rows: int) -> int:
        """Passes over this many rows that the steps take, the last one perhaps not to its end."""
        taken = self.batch_size * self.gradient_accumulation
        return self.epochs if self.steps is None else -(-self.steps * taken // rows)

    def fixed(self) -> dict[str, Any]:
        """The settings that a continuation must share. Runs from before there were some of them had `BEFORE`."""
        found = {k: v for k, v in dataclasses.asdict(self).items() if k not in FREE}
        return {k: v for k, v in found.items() if k not in BEFORE or v != BEFORE[k]}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any, positive: bool) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return is_number and (value > 0 if positive else value >= 0)
