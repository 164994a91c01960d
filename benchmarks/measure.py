"""Timing side by side: the candidates take turns within one run, so that a drifting machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Row:
    """One line of the benchmark table.

    Attributes:
        goal: what is measured and the limit it should keep.
        measured: the number, with its unit.
        spread: how much it varied, or "" for what does not vary.
        met: whether the limit is kept; None if there is none.
        note: what the reader must know to trust the number.
    """

    goal: str
    measured: str
    spread: str
    met: bool | None
    note: str = ""


@dataclass(frozen=True)
class Ratio:
    """A candidate's time over the reference's: median of the rounds' ratios, and the middle half of them."""

    median: float
    low: float
    high: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interleaved(
    candidates: Mapping[str, Callable[[], object]], reference: str, *, rounds: int, repeats: int = 1
) -> dict[str, Ratio]:
    """Runs every candidate once per round and compares within the round.

    Args:
        candidates: {name: function to time}; results are waited for (`jax.block_until_ready`).
        reference: the name to divide by.
        rounds: counted rounds, after one that is not.
        repeats: calls per candidate and round.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for number in range(rounds + 1):
        for name in names if number % 2 else reversed(names):
            start = time.perf_counter()
            for _ in range(repeats):
                jax.block_until_ready(candidates[name]())
            if number:
                times[name].append((time.perf_counter() - start) / repeats)
    found = {}
    for name, seconds in times.items():
        ratios = [s / r for s, r in zip(seconds, times[reference], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        found[name] = Ratio(statistics.median(ratios), low, high, statistics.median(seconds))
    return found
