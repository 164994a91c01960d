"""What a terminal shows of work that takes long: a spinner, or a bar once the total is known."""

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn


class Bar:
    """Progress on a terminal, or nothing. `bar(done, total)` is an `OnProgress` of `progress`."""

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
