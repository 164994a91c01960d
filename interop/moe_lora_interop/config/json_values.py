"""Values in JSON's own types."""

from collections.abc import Mapping
from enum import Enum
from typing import Any


def as_json(value: Any) -> Any:
    """A private copy in JSON's own types (tuples and sets become lists, enums their values)."""
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    return str(value.value) if isinstance(value, Enum) else value
