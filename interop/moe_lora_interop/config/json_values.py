"""Values in JSON's own types."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from moe_lora_interop.config.routing_rule import routing_dict
from moe_lora_interop.config.routings import is_rule


def as_json(value: Any) -> Any:
    """A private copy in JSON's own types: tuples and sets become lists, enums their values, registered routings what a
    config says of them."""
    if is_rule(value):
        value = routing_dict(value)
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    return str(value.value) if isinstance(value, Enum) else value
