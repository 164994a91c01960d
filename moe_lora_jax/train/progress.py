"""A progress bar with loss and tokens/s on a terminal; silence elsewhere. And the signals that end a run in order."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Show = Callable[[int, float, float], None]


@contextlib.contextmanager
def progress_bar(console: Console, total: int, start: int) -> Iterator[Show]:
    """Yields show(step, loss, tokens_per_second), which moves the bar if `console` is a terminal."""
    if not console.is_terminal:
        yield lambda step, loss, speed: None
        return
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=total, completed=start, text="compiling")
        yield lambda step, loss, speed: bar.update(task, completed=step, text=f"loss {loss:.4f}  {speed:,.0f} tokens/s")


class Stop(threading.Event):
    """Set by a signal; `number` is which."""

    number: signal.Signals | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Yields an event that SIGTERM or Ctrl-C sets, so that the loop can save and end. A second one acts as usual.

    Outside the main thread Python allows no handlers, and the event is never set.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: object) -> None:
        stop.number = signal.Signals(number)
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
