"""TensorBoard event files, derived from the lines of metrics.jsonl."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_lora_jax.train.errors import TrainingError


class Events:
    """A folder of event files that says what the records say: written anew at the start, so no step is there twice.

    Args:
        folder: replaced.
        records: lines of metrics.jsonl so far. Their numbers become scalars under the same names.

    Raises:
        TrainingError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, records: Iterable[Mapping[str, Any]]):
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            problem = "tensorboard: needs the package tensorboardX: pip install 'moe-lora-jax[train]'"
            raise TrainingError("cannot write TensorBoard events", [problem]) from error
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """The numbers of one record, at once."""
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
