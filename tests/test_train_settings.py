"""Training settings: every wrong value is named."""

import pytest

from moe_lora_interop.errors import ConfigError
from moe_lora_jax.train.settings import TrainSettings


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"epochs": 0}, "epochs: found 0, expected an integer >= 1"),
        ({"epochs": 1.5}, "epochs: found 1.5"),
        ({"steps": 0}, "steps: found 0, expected null or an integer >= 1"),
        ({"batch_size": None}, "batch_size: found None, expected an integer >= 1"),
        ({"gradient_accumulation": True}, "gradient_accumulation: found True"),
        ({"learning_rate": 0.0}, "learning_rate: found 0.0, expected a finite number > 0"),
        ({"learning_rate": float("nan")}, "learning_rate: found nan"),
        ({"warmup_steps": -1}, "warmup_steps: found -1, expected an integer >= 0"),
        ({"weight_decay": -0.1}, "weight_decay: found -0.1, expected a finite number >= 0"),
        ({"max_grad_norm": 0}, "max_grad_norm: found 0, expected null or a finite number > 0"),
        ({"train_only": "bias"}, "train_only: found 'bias', expected one of all, router, experts"),
        ({"seed": -1}, "seed: found -1"),
        (
            {"matmul_precision": "fp32"},
            "matmul_precision: found 'fp32', expected null or one of default, high, highest",
        ),
        ({"loss_chunk": 0}, "loss_chunk: found 0, expected null or an integer >= 1"),
        ({"eval_every": 0}, "eval_every: found 0"),
        ({"checkpoint_every": 0}, "checkpoint_every: found 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints: found 0"),
        ({"log_every": 0}, "log_every: found 0"),
    ],
)
def test_wrong_values(fields, problem):
    with pytest.raises(ConfigError) as caught:
        TrainSettings(**fields)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(problem)


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        TrainSettings(epochs=0, seed=-1, learning_rate=-1)
    assert len(caught.value.problems) == 3


def test_total_steps():
    assert TrainSettings(epochs=3, batch_size=4, gradient_accumulation=2).total_steps(10) == 4  # 30 rows in eights
    assert TrainSettings(steps=7, epochs=3).total_steps(10) == 7
    assert TrainSettings(epochs=1, batch_size=4).total_steps(3) == 1


def test_total_epochs_hold_enough_full_batches():
    assert TrainSettings(epochs=3).total_epochs(10) == 3
    for steps, examples in ((1, 10), (5, 10), (6, 10), (7, 1), (3, 8)):
        settings = TrainSettings(steps=steps, batch_size=4, gradient_accumulation=2)
        rows, epochs = steps * 8, settings.total_epochs(examples)
        assert epochs * examples >= rows > (epochs - 1) * examples


def test_a_continuation_may_change_what_is_shown_and_kept_only():
    free = {"eval_every", "checkpoint_every", "keep_checkpoints", "log_every", "save_best", "report_to", "resume"}
    settings = TrainSettings(matmul_precision="high", loss_chunk=128, packing=True)
    assert set(settings.fixed()) == set(TrainSettings.__dataclass_fields__) - free


def test_runs_from_before_there_were_some_settings_are_continued_without_them():
    before = {"epochs", "steps", "batch_size", "gradient_accumulation", "learning_rate", "warmup_steps"}
    before |= {"weight_decay", "max_grad_norm", "train_only", "seed"}
    assert set(TrainSettings().fixed()) == before
