"""Intervals for means over tasks: seeds and test items are drawn again, with replacement."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

DRAWS = 4000
Values = dict[str, np.ndarray]
"""{task: [seed, item]}."""


def test_values(rows: Sequence[Mapping[str, Any]], field: str) -> Values:
    """The losses or the exact matches (field "loss" or "correct") of some rows, one row per seed."""

    def of(row: Mapping[str, Any], task: str) -> list[float]:
        found = row["test"][task][field]
        return [float(c) for c in found] if isinstance(found, str) else found

    return {task: np.array([of(row, task) for row in rows], float) for task in rows[0]["test"]}


test_values.__test__ = False  # type: ignore[attr-defined]


def mean(values: Values) -> float:
    """Tasks count alike, whatever their size."""
    return float(np.mean([v.mean() for v in values.values()]))


def interval(values: Values, other: Values | None = None, *, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the resampled mean, or of its difference from `other`'s mean.

    Both methods are scored on the same items, so a draw takes the same ones for both; seeds are drawn for each alone.
    """
    random = np.random.default_rng(seed)
    draws = np.empty(DRAWS)
    for n in range(DRAWS):
        items = {task: random.integers(v.shape[1], size=v.shape[1]) for task, v in values.items()}
        draws[n] = _drawn(values, items, random)
        if other is not None:
            draws[n] -= _drawn(other, items, random)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def _drawn(values: Values, items: Mapping[str, np.ndarray], random: np.random.Generator) -> float:
    seeds = len(next(iter(values.values())))
    chosen = random.integers(seeds, size=seeds)
    return float(np.mean([v[np.ix_(chosen, items[task])].mean() for task, v in values.items()]))
