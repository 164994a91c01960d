"""The errors that this library raises: each lists every problem found, or everything to do, not only the first."""

from collections.abc import Sequence

from interop.printable import printable


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
