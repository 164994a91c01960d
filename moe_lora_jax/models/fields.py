"""Typed access to config.json that collects every problem instead of stopping at the first."""

from collections.abc import Mapping
from typing import Any


class Fields:
    """The fields of a config.json over the defaults of its family.

    A value of the wrong kind adds a line to `problems` and reads as a harmless stand-in, so that one pass over the
    file names everything that is wrong with it. Check `problems` before using what was read.
    """

    def __init__(self, stated: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.stated = stated
        self.values = {**defaults, **stated}
        self.problems: list[str] = []

    def refuse(self, field: str, why: str) -> None:
        """Record, once, that `field` cannot be honoured."""
        if f"{field}: {why}" not in self.problems:
            self.problems.append(f"{field}: {why}")

    def get(self, field: str) -> Any:
        """The value stated in the file, else the family's default, else None."""
        return self.values.get(field)

    def integer(self, field: str, *, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        """An integer in this range; `minimum` stands in for a wrong one."""
        value = self.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.refuse(field, f"found {value!r}, expected an integer of at least {minimum}")
            return minimum
        if value > maximum:
            self.refuse(field, f"found {value}, expected at most {maximum}")
            return minimum
        return value

    def token_ids(self, field: str) -> tuple[int, ...]:
        """Zero, one or several token ids: null, an integer or a list; () stands in for a wrong one. -1 means none."""
        value = self.get(field)
        ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
        ids = [i for i in ids if not (type(i) is int and i == -1)]
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 2**31 for i in ids):
            self.refuse(field, f"found {value!r}, expected null, a token id or a list of them")
            return ()
        return tuple(ids)

    def number(self, field: str) -> float:
        """A positive finite number; 1.0 stands in for a wrong one."""
        value = self.get(field)
        if not is_positive_number(value):
            self.refuse(field, f"found {value!r}, expected a positive number")
            return 1.0
        return float(value)

    def optional_number(self, field: str) -> float | None:
        """A positive number, or None where the field is null or absent."""
        return None if self.get(field) is None else self.number(field)

    def flag(self, field: str) -> bool:
        """A boolean; False stands in for a wrong one."""
        value = self.get(field)
        if not isinstance(value, bool):
            self.refuse(field, f"found {value!r}, expected true or false")
            return False
        return value


def is_positive_number(value: Any) -> bool:
    """True for a finite int or float above zero (bool excluded)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300
