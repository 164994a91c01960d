"""What a training run left beside its adapter, as far as a stranger wants to know it: JSON in the folder `training`."""

import json
import os
from pathlib import Path
from typing import Any

from moe_lora_interop.disk.files import read_json
from moe_lora_interop.errors import CheckpointError

FOLDER, RUN, METRICS, STARTS = "training", "run.json", "metrics.jsonl", "starts.jsonl"


def read_metrics(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of OUT/training/metrics.jsonl, without one that a crash cut off; empty if there is no such file."""
    path = Path(output_dir, FOLDER, METRICS)
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [record for line in lines if (record := _record(line))]


def read_settings(output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in OUT/training/run.json; empty if there is no such file.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = Path(output_dir, FOLDER, RUN)
    return dict(read_json(path).get("settings", {})) if path.is_file() else {}


def training_in_words(output_dir: Path) -> str:
    """How long and on how many examples the adapter was trained, and the losses.

    Empty where no run has left a word, or another program has a folder of this name: no save fails for want of words.
    """
    try:
        return _in_words(output_dir)
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return ""


def _in_words(output_dir: Path) -> str:
    run, metrics = output_dir / FOLDER / RUN, read_metrics(output_dir)
    steps = [record["step"] for record in metrics if "lm_loss" in record]
    if not run.is_file() or not steps:
        return ""
    identity = read_json(run)
    settings, data = identity["settings"], identity["data"]
    rows, rate = settings["batch_size"] * settings["gradient_accumulation"], settings["learning_rate"]
    words = f"{steps[-1]} steps of {rows} rows by AdamW, learning rate {rate:g} at its peak, on {data}."
    losses = [("in training", "lm_loss", None), ("on held-out data", "eval_loss", identity["eval_data"])]
    for where, name, held_out in losses:
        found = [(record["step"], record[name]) for record in metrics if name in record]
        if found:
            (first, before), (last, after) = found[0], found[-1]
            words += f" Loss {where} (nats per token): {before:.3f} at step {first}, {after:.3f} at step {last}"
            words += f" ({held_out})." if held_out else "."
    return words


def _record(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None  # cut off by a crash
