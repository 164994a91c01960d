"""The table of results, on the terminal and as Markdown."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Ratio, Row

HEADINGS = ("goal", "measured", "spread", "met", "note")


def ratio_row(goal: str, ratio: Ratio, met: bool | None, note: str) -> Row:
    """The row of a ratio, with the quartiles of its rounds."""
    return Row(goal, f"{ratio.median:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}", met, note)


def results(rows: Callable[[bool], Iterator[Row]], *, quick: bool) -> Iterator[Row]:
    """The rows of a benchmark; tiny sizes judge nothing."""
    return (replace(row, met=None) if quick else row for row in rows(quick))


def alone(
    rows: Callable[[bool], Iterator[Row]], of_directory: Callable[[Path, bool], Iterator[Row]] | None = None
) -> None:
    """What a benchmark does when it is run by itself: a line as soon as it is measured.

    Args:
        rows: called with whether --quick was given.
        of_directory: called instead if a model's Hugging Face directory was given.
    """
    directories = [Path(argument) for argument in sys.argv[1:] if argument != "--quick"]
    if len(directories) > (of_directory is not None):
        raise SystemExit(
            f"arguments: found {sys.argv[1:]}, expected {'at most one directory' if of_directory else 'none'}"
        )
    if directories and of_directory is not None:
        rows = partial(of_directory, directories[0])
    for row in results(rows, quick="--quick" in sys.argv):
        print(" | ".join(cells(row)), flush=True)


def cells(row: Row) -> tuple[str, ...]:
    met = {True: "yes", False: "no", None: "-"}[row.met]
    return (row.goal, row.measured, row.spread, met, row.note)


def show(rows: Iterable[Row]) -> None:
    """Prints the table."""
    table = Table(*HEADINGS, show_lines=True)
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)


def markdown(rows: Iterable[Row]) -> str:
    """The same as a Markdown table."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *map(cells, rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
