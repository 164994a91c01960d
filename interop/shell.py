"""Where a verb's words go, and the two flags that say so: the result and remarks to stdout, progress to stderr."""

import contextlib
import json
from collections.abc import Iterator
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn

from interop.printable import printable

Quiet = Annotated[bool, tyro.conf.arg(help="No progress and no remarks: only what was asked for, errors and warnings.")]
Json = Annotated[bool, tyro.conf.arg(help="Print the result as JSON, and no other text.")]


class Shell:
    """A verb's output under its flags.

    Args:
        quiet: no progress and no remarks. Errors and warnings never come this way.
        json: the result is one JSON document, alone on stdout.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False):
        self.json = json
        self.remarks = Console(quiet=quiet or json, highlight=False, markup=False, soft_wrap=True)
        self.terminal = Console(stderr=True, quiet=quiet)

    def say(self, line: str) -> None:
        """A remark: beside the result, or the only word where the result is files."""
        if not self.remarks.quiet:
            print(printable(line))

    def give(self, result: Any) -> None:
        """The result, if --json wants it."""
        if self.json:
            print(json.dumps(result, indent=2, default=str))

    def progress(self, text: str) -> "contextlib.AbstractContextManager[Bar]":
        """See `progress`."""
        return progress(text, self.terminal)


class Bar:
    """Progress on a terminal, or nothing. `bar(done, total)` is an `interop.progress.OnProgress`."""

    def __init__(self, shown: Progress | None, text: str):
        self._shown = shown
        self._task = shown.add_task(text, total=None) if shown is not None else None

    def __call__(self, done: int, total: int, text: str | None = None) -> None:
        if self._shown is not None and self._task is not None:
            self._shown.update(self._task, completed=done, total=total, description=text)

    def stage(self, text: str) -> None:
        """What begins now; until the bar is called, nobody knows how much it is."""
        if self._shown is not None and self._task is not None:
            self._shown.remove_task(self._task)
            self._task = self._shown.add_task(text, total=None)


@contextlib.contextmanager
def progress(text: str, console: Console | None = None) -> Iterator[Bar]:
    """A spinner, or a bar once the total is known, with the time gone by; removed at the end.

    Nothing is shown where `console` (default: stderr) is quiet or no terminal.
    """
    console = console or Console(stderr=True)
    if console.quiet or not console.is_terminal:
        yield Bar(None, text)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), _Bar(), _Count(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        yield Bar(shown, text)


class _Bar(BarColumn):
    def render(self, task: Task) -> Any:
        return "" if task.total is None else super().render(task)


class _Count(MofNCompleteColumn):
    def render(self, task: Task) -> Any:
        return "" if task.total is None else super().render(task)
