"""The two errors this library raises about data: each lists every problem found, not only the first."""

from collections.abc import Sequence


class _ProblemList(Exception):
    """An error with a headline and one line per problem."""

    def __init__(self, what: str, problems: Sequence[str] = ()):
        self.what = what
        self.problems = tuple(problems)
        super().__init__(what if not self.problems else "\n  - ".join([f"{what}:", *self.problems]))

    def __reduce__(self):
        return type(self), (self.what, self.problems)


class CheckpointError(_ProblemList):
    """A checkpoint cannot be read, written or applied. `.problems` has one entry per tensor, file or field."""


class ConfigError(_ProblemList, ValueError):
    """A configuration is invalid. `.problems` has one entry per wrong field."""
