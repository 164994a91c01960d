"""The file of rows: one JSON object per run, one line each."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parent / "rows.jsonl"


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if there is no such file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Adds a row, on the disk when this returns: a run takes minutes."""
    with file.open("a") as out:
        out.write(json.dumps(row, separators=(",", ":")) + "\n")
        out.flush()
        os.fsync(out.fileno())
