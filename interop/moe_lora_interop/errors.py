"""The errors that this library raises: each lists every problem found, or everything to do, not only the first.

A problem is one line, "NAME: found X, expected Y".
"""

import difflib
from collections.abc import Iterable, Sequence


class _ProblemList(Exception):
    """An error with a headline and one line per problem; printing it is safe, whatever names a file has."""

    def __init__(self, what: str, problems: Sequence[str] = ()):
        self.what = what
        self.problems = tuple(problems)
        lines = [f"{what}:", *self.problems] if self.problems else [what]
        super().__init__("\n  - ".join(map(printable, lines)))

    def __reduce__(self):
        return type(self), (self.what, self.problems)


class CheckpointError(_ProblemList):
    """A checkpoint cannot be read, written or applied. `.problems` has one entry per tensor, file or field."""


class ConfigError(_ProblemList, ValueError):
    """A configuration is invalid. `.problems` has one entry per wrong field."""


class OutOfMemoryError(_ProblemList, MemoryError):
    """The work does not fit into memory. `.problems` says what could not be had, then what makes the work smaller."""


def printable(text: str) -> str:
    r"""The text, cut if long, with every character that is not printable as an escape: \n, \x1b."""
    longest = 2000
    if len(text) > longest:
        return f"{printable(text[:longest])} ... ({len(text)} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def expected(name: str, known: Iterable[str]) -> str:
    """ "expected one of a, b, c", and the one that was probably meant."""
    names = sorted(known)
    return f"expected one of {', '.join(names)}{did_you_mean(name, names)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean a?", or nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
