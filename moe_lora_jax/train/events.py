"""TensorBoard event files, derived from the lines of metrics.jsonl."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_lora_jax.train.errors import TrainingError


class Events:
    """A folder of event files that says what the records say: written anew at the start, so no step is there twice.

    Args:
        folder: replaced.
        about: what the run is: its hyperparameters, shown as those, and its command, as a text.
        records: lines of metrics.jsonl so far. Their numbers become scalars under the same names.

    Raises:
        TrainingError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], records: Iterable[Mapping[str, Any]]):
        try:
            from tensorboardX import SummaryWriter
            from tensorboardX.summary import hparams
        except ModuleNotFoundError as error:
            problem = "report_to: tensorboard needs the package tensorboardX: pip install 'moe-lora-jax[train]'"
            raise TrainingError("cannot write TensorBoard events", [problem]) from error
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        for summary in hparams(dict(_flat(about)), {"lm_loss": 0, "eval_loss": 0}):  # of the metrics only the names
            self._writer.file_writer.add_summary(summary)
        self._writer.add_text("command", about["command"])
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """The numbers of one record, at once."""
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self, *, failed: bool = False) -> None:
        self._writer.close()


def numbers(record: Mapping[str, Any]) -> dict[str, int | float]:
    """What a record says beside its step, without each router's own state."""
    return {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}


def _flat(about: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    for name, value in about.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, bool | int | float | str) else str(value)
