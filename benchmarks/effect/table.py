"""The tables of RESULTS.md, from the rows: `python -m benchmarks.effect.table` writes them between its two marks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.effect.bootstrap import interval, mean, test_values
from benchmarks.effect.methods import METHODS
from benchmarks.effect.plan import RATES, SEEDS, final_rows
from benchmarks.effect.rows import ROWS, read_rows

RESULTS = Path(__file__).parent / "RESULTS.md"
MARKS = ("<!-- from here on: benchmarks/effect/table.py -->", "<!-- to here -->")
REFERENCE = "lora"

Rows = Sequence[Mapping[str, Any]]


def finished(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """{method: its final rows} of the methods that have all seeds, in the order of METHODS."""
    present = {row["method"] for row in rows}
    found = {method: final_rows(rows, method) for method in METHODS if method in present}
    return {method: of_method for method, of_method in found.items() if len(of_method) == len(SEEDS)}


def tables(rows: Rows) -> str:
    """All tables, as Markdown."""
    methods = finished(rows)
    missing = [method for method in METHODS if method not in methods]
    parts = [comparison(rows, methods), by_task(rows, methods), routing(methods), rates(rows)]
    if missing:
        parts.insert(0, f"**Not complete**: {', '.join(missing)} still lack runs.")
    return "\n\n".join(parts)


def comparison(rows: Rows, methods: Mapping[str, Rows]) -> str:
    """Accuracy, loss and forgetting; [95 % intervals] over seeds and items."""
    base = next(row for row in rows if row["method"] == "base")
    names = list(base["general_loss"])
    lines = [
        ["method", "parameters", "lr", "accuracy, %", f"minus {REFERENCE}'s", "loss", f"minus {REFERENCE}'s"]
        + [f"{name}: change of loss" for name in names],
        ["base", "0", "", f"{100 * mean(test_values([base], 'correct')):.1f}", ""]
        + [f"{mean(test_values([base], 'loss')):.3f}", "", *("0" for _ in names)],
    ]
    for method, of_method in methods.items():
        reference = methods[REFERENCE] if method != REFERENCE and REFERENCE in methods else None
        forgotten = [np.mean([r["general_loss"][n] for r in of_method]) - base["general_loss"][n] for n in names]
        lines.append(_cells(method, of_method, reference) + [f"{change:+.3f}" for change in forgotten])
    return _markdown(lines)


def _cells(method: str, rows: Rows, reference: Rows | None) -> list[str]:
    cells = [method, f"{rows[0].get('parameters', 0):,}", f"{rows[0]['learning_rate']:g}"]
    for field, scale, digits in (("correct", 100, 1), ("loss", 1, 3)):
        values = test_values(rows, field)
        cells.append(_with_interval(scale * mean(values), [scale * v for v in interval(values)], digits, sign=""))
        if reference is None:
            cells.append("")
            continue
        others = test_values(reference, field)
        difference = scale * (mean(values) - mean(others))
        cells.append(_with_interval(difference, [scale * v for v in interval(values, others)], digits, sign="+"))
    return cells


def by_task(rows: Rows, methods: Mapping[str, Rows]) -> str:
    """Exact match in percent, mean over seeds."""
    base = [row for row in rows if row["method"] == "base"]
    tasks = list(base[0]["test"])
    lines = [["accuracy, %", *tasks]]
    for method, of_method in {"base": base, **methods}.items():
        values = test_values(of_method, "correct")
        lines.append([method, *(f"{100 * values[task].mean():.0f}" for task in tasks)])
    return _markdown(lines)


def routing(methods: Mapping[str, Rows]) -> str:
    """What the routers learned; the knock-out is of the second seed."""
    lines = [["method", "gate entropy / log E", "task and expert, bits", "largest share", "knock-out: own task"]]
    lines[0] += ["other tasks", "p"]
    for method, rows in methods.items():
        if "entropy" in rows[0]:
            means = [
                np.mean([row[field] for row in rows]) for field in ("entropy", "task_information", "largest_share")
            ]
            (knocked,) = [row["knockout"] for row in rows if "knockout" in row]
            shown = [f"{knocked[k]:+.3f}" for k in ("own", "others")] + [f"{knocked['p']:.1g}"]
            lines.append([method, *(f"{value:.3f}" for value in means), *shown])
    return _markdown(lines)


def rates(rows: Rows) -> str:
    """Validation loss of the first seed by learning rate: what was tuned, and how."""
    lines = [["validation loss", *(f"lr {rate:g}" for rate in RATES)]]
    for method in METHODS:
        first = [row for row in rows if row["method"] == method and row["seed"] == SEEDS[0]]
        found = {row["learning_rate"]: row["validation_loss"] for row in first}
        if found:
            lines.append([method, *(f"{found[rate]:.3f}" if rate in found else "" for rate in RATES)])
    return _markdown(lines)


def _with_interval(value: float, ends: Sequence[float], digits: int, *, sign: str) -> str:
    low, high = ends
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + " --- |" * len(lines[0]), *body])


def replaced(text: str, new: str) -> str:
    """RESULTS.md with other tables."""
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{new}\n\n{MARKS[1]}{after}"


def write_tables(rows: Rows) -> None:
    """Puts the tables of these rows into RESULTS.md."""
    RESULTS.write_text(replaced(RESULTS.read_text(), tables(rows)))
    print(f"{RESULTS}: {len(rows)} rows")


if __name__ == "__main__":
    write_tables(read_rows(ROWS))
