"""OUT/best: the adapter with the lowest evaluation loss so far, and which that is."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from moe_lora_interop.disk.atomic import replace_file
from moe_lora_jax.adapters.checkpoint import save_pretrained
from moe_lora_jax.processes import once

FOLDER, RECORD = "best", "best.json"


class Best(NamedTuple):
    """Which adapter is the best: the step that it is of, and its evaluation loss in nats per token."""

    step: int
    eval_loss: float


class BestAdapter:
    """Keeps the best adapter in a folder. What a continuation finds there counts, also if it was of a later step.

    Args:
        folder: written at the first evaluation.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        stored = once(self._read)
        self.best = None if stored is None else Best(**stored)

    def is_better(self, loss: float) -> bool:
        """Whether no adapter so far had a loss as low."""
        return math.isfinite(loss) and (self.best is None or loss < self.best.eval_loss)

    def save(self, model: nnx.Module, best: Best) -> None:
        """Replaces what is there by the adapter that the model carries. A crash before the record repeats the save."""
        save_pretrained(model, self._folder)
        once(lambda: replace_file(self._folder / RECORD, (json.dumps(best._asdict()) + "\n").encode()))
        self.best = best

    def _read(self) -> dict[str, Any] | None:
        record = self._folder / RECORD
        return json.loads(record.read_text("utf-8")) if record.exists() else None
