"""A run at Weights & Biases. The package is imported only where it is asked for."""

import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_lora_interop.disk.atomic import replace_file
from moe_lora_jax.train.errors import TrainingError
from moe_lora_jax.train.events import numbers

PROJECT = "moe-lora"


class WandbRun:
    """The same numbers as in metrics.jsonl, in one W&B run, which a continuation takes up again.

    W&B's own environment variables hold: WANDB_MODE=offline, WANDB_PROJECT (without it, "moe-lora"), WANDB_API_KEY.

    Args:
        folder: gets W&B's files, and the id of the run. It is named `wandb`: W&B says so.
        about: what the run is: the config that W&B shows.
        records: lines of metrics.jsonl so far; sent if the run is new at W&B. Steps that W&B has are left as they are.

    Raises:
        TrainingError: wandb refuses.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], records: Iterable[Mapping[str, Any]]):
        import wandb

        file = folder / "id"
        is_new = not file.exists()
        if is_new:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(file, secrets.token_hex(8).encode())
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=about["output_dir"],
                id=file.read_text("utf-8"),
                dir=str(folder.parent),
                config=dict(about),
                resume="allow",
                allow_val_change=True,  # a continuation may be longer
            )
        except wandb.Error as error:
            raise TrainingError("cannot report to Weights & Biases", [str(error)]) from error
        for record in records if is_new else ():
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """The numbers of one record."""
        self._run.log(numbers(record), step=record["step"])

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))
