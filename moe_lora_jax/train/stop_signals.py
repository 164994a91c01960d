"""The signals that end a run in order."""

import contextlib
import signal
import threading
from collections.abc import Iterator


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
