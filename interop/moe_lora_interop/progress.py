"""How long work tells how far it is: by a function that it is given. What is then shown: `progress_bar`."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

OnProgress = Callable[[int, int], Any]
"""Called with (done, total) as the work goes on."""

Item = TypeVar("Item")


def no_progress(done: int, total: int) -> None:
    """The `OnProgress` of callers who do not ask."""


def tracked(items: Collection[Item], on_progress: OnProgress) -> Iterator[Item]:
    """The items; on_progress(how many, of how many) after the work on each."""
    for number, item in enumerate(items, start=1):
        yield item
        on_progress(number, len(items))
