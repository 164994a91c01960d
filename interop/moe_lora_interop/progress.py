"""How long work reports its progress: it calls a function that it is given. What a terminal shows: `progress_bar`."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

OnProgress = Callable[[int, int], Any]
"""Called with (done, total) as the work goes on."""

Item = TypeVar("Item")


def no_progress(done: int, total: int, text: str | None = None) -> None:
    """The `OnProgress` of callers who do not ask."""


def tracked(items: Collection[Item], on_progress: OnProgress) -> Iterator[Item]:
    """The items; on_progress(how many, of how many) after the work on each."""
    for number, item in enumerate(items, start=1):
        yield item
        on_progress(number, len(items))
