"""A run's progress in lines, where no terminal shows a bar: nohup, Slurm, a notebook's log."""

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from moe_lora_interop.cli.shell import Shell


class LogLines:
    """The `on_log` of a verb that trains. The time left is what the steps since the first line have taken.

    Args:
        total_steps: of the run.
    """

    def __init__(self, shell: Shell, total_steps: int):
        self._shell, self._total = shell, total_steps
        self._first: tuple[int, float] | None = None  # the step of the first line, and when: compiling came before it

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        where = f"step {step} of {self._total}"
        if "eval_loss" in metrics:
            self._shell.log(f"{where}: evaluation loss {metrics['eval_loss']:.4f}")
            return
        speed = f"loss {metrics['lm_loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s"
        self._shell.log(f"{where}: {speed}{self._left(step)}")

    def _left(self, step: int) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        first, then = self._first
        if step == first or step == self._total:
            return ""
        seconds = (now - then) / (step - first) * (self._total - step)
        return f", {timedelta(seconds=round(seconds))} left"
