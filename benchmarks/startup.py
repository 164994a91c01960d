"""Goal 7: how long a new process takes until it has imported `moe_lora_interop`, and until it has printed its help."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.measure import Row
from benchmarks.table import alone

RUNS = 10


def start_row(goal: str, command: Sequence[str | Path], *, limit: float | None, runs: int = RUNS) -> Row:
    """The median of some runs after one that is not counted, in seconds from start to end of the process."""
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    low, median, high = statistics.quantiles(seconds[1:], n=4)
    note = f"median of {runs} warm runs, {len(os.sched_getaffinity(0))} CPU cores"
    met = None if limit is None else median <= limit
    return Row(goal, f"{median:.3f} s", f"{low:.3f} to {high:.3f}", met, note)


def rows(quick: bool) -> Iterator[Row]:
    runs = 2 if quick else RUNS
    python = sys.executable
    yield start_row("7. import numpy, which is not ours", [python, "-c", "import numpy"], limit=None, runs=runs)
    yield start_row(
        "7. import moe_lora_interop <= 0.25 s", [python, "-c", "import moe_lora_interop"], limit=0.25, runs=runs
    )
    yield start_row(
        "7. moe-lora --help <= 0.25 s", [python, "-m", "moe_lora_interop.cli.main", "--help"], limit=0.25, runs=runs
    )


if __name__ == "__main__":
    alone(rows)
