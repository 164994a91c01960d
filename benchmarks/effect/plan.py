"""Which run is next: each method's learning rate is tuned on validation with one seed, then repeated with others."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
GRID = RATES[1:4]  # tried first; while the best is at an edge of what was tried, the next one of RATES is tried too
SEEDS = (0, 1, 2)


class Run(NamedTuple):
    method: str
    learning_rate: float
    seed: int


def next_run(rows: Sequence[Mapping[str, Any]], methods: Iterable[str]) -> Run | None:
    """The first run that the rows lack, method by method; None when all are there."""
    done = {Run(row["method"], row["learning_rate"], row["seed"]) for row in rows}
    for method in methods:
        tried = sorted({run.learning_rate for run in done if run.method == method} | set(GRID))
        wanted = [Run(method, rate, SEEDS[0]) for rate in tried]
        if done >= set(wanted):
            best = RATES.index(best_rate(rows, method))
            around = RATES[max(best - 1, 0) : best + 2]
            wanted = [Run(method, rate, SEEDS[0]) for rate in around]
            wanted += [Run(method, RATES[best], seed) for seed in SEEDS] if done >= set(wanted) else []
        for run in wanted:
            if run not in done:
                return run
    return None


def best_rate(rows: Sequence[Mapping[str, Any]], method: str) -> float:
    """The learning rate with the lowest validation loss at the first seed."""
    tried = [row for row in rows if row["method"] == method and row["seed"] == SEEDS[0]]
    return min(tried, key=lambda row: row["validation_loss"])["learning_rate"]


def final_rows(rows: Sequence[Mapping[str, Any]], method: str) -> list[Mapping[str, Any]]:
    """The rows that count for the comparison: the best learning rate, one per seed."""
    rate = best_rate(rows, method)
    return [row for row in rows if row["method"] == method and row["learning_rate"] == rate]
