"""What a field of the config may hold: its metadata, a check and the words for it in errors and in FORMAT.md."""

import json
import math
import re
from collections.abc import Callable
from typing import Any, NotRequired, TypedDict

from moe_lora_interop.config.routing_rule import is_routing

LARGEST = 2**16  # of ranks, experts, sizes: beyond any use, and small enough that nothing built from it explodes


class Allowed(TypedDict):
    """`holds` says whether a value is allowed, `words` which values are; `version` and `values`: see `since`."""

    holds: Callable[[Any], bool]
    words: str
    version: NotRequired[int]
    values: NotRequired[tuple[str, ...]]


def since(version: int, allowed: Allowed, *values: str) -> Allowed:
    """What only a later version of the file format can say: a field, which files of that version have only where it is
    not the default; or, with `values`, these values of a field that was there before."""
    return Allowed(**allowed, version=version, values=values)


def integer(low: int) -> Allowed:
    def holds(v: Any) -> bool:
        return isinstance(v, int) and not isinstance(v, bool) and low <= v <= LARGEST

    return Allowed(holds=holds, words=f"an integer >= {low}")


def number(words: str, is_in_range: Callable[[float], bool]) -> Allowed:
    def holds(v: Any) -> bool:
        is_number = isinstance(v, int | float) and not isinstance(v, bool)
        return is_number and abs(v) < 1e300 and math.isfinite(v) and is_in_range(v)

    return Allowed(holds=holds, words=words)


def one_of(*values: str) -> Allowed:
    return Allowed(holds=lambda v: isinstance(v, str) and v in values, words=f"one of {', '.join(values)}")


def exactly(value: str) -> Allowed:
    return Allowed(holds=lambda v: v == value, words=value)


def optional(allowed: Allowed, null: str = "null or ") -> Allowed:
    """`null` begins the words, where a list of alternatives follows or null has a name of its own."""
    return Allowed(holds=lambda v: v is None or allowed["holds"](v), words=null + allowed["words"])


def list_of(item: Allowed, words: str) -> Allowed:
    """A list with at least one item."""
    return Allowed(holds=lambda v: isinstance(v, list) and v != [] and all(map(item["holds"], v)), words=words)


def one_or_list(item: Allowed, words: str) -> Allowed:
    several = list_of(item, words)
    return Allowed(holds=lambda v: item["holds"](v) or several["holds"](v), words=words)


def per_expert(item: Allowed) -> Allowed:
    return one_or_list(item, f"{item['words']}, or a list of them, one per expert")


def by_module(value: Allowed, words: str) -> Allowed:
    """A pattern: {regular expression: value}."""

    def holds(v: Any) -> bool:
        return isinstance(v, dict) and all(_is_regex(k) and value["holds"](x) for k, x in v.items())

    return Allowed(holds=holds, words=f"{{regular expression: {words}}}")


def _is_regex(value: Any, form: str = "(.*\\.)?({})$") -> bool:
    """Whether it is a regular expression where PEFT puts it."""
    try:
        re.compile(form.format(value))
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return True


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_target(value: Any) -> bool:
    return all(map(_is_name, value)) if isinstance(value, list) else _is_name(value) and _is_regex(value, "{}")


def _is_object(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(value, dict)


BOOL = Allowed(holds=lambda v: isinstance(v, bool), words="true or false")
TEXT = Allowed(holds=lambda v: isinstance(v, str), words="a string")
NAME = Allowed(holds=_is_name, words="a name")
NAME_PATTERN = Allowed(holds=lambda v: _is_name(v) and _is_regex(v), words="a name")
TARGETS = Allowed(holds=_is_target, words="a list of module names or a regular expression")
ROUTING = Allowed(holds=is_routing, words='a registered routing, {"name": name, "version": integer >= 1, its fields}')
OBJECT = Allowed(holds=_is_object, words="a JSON object")
FINITE = number("a finite number", lambda v: True)
POSITIVE = number("a finite number > 0", lambda v: v > 0)
NOT_NEGATIVE = number("a finite number >= 0", lambda v: v >= 0)
FRACTION = number("a number in [0, 1)", lambda v: 0 <= v < 1)
PROBABILITY = number("a number in (0, 1]", lambda v: 0 < v <= 1)
RANK, ALPHA = per_expert(integer(1)), per_expert(POSITIVE)
LAYERS = one_or_list(integer(0), "a layer number or a list of layer numbers")
LAYER_NAMES = one_or_list(NAME_PATTERN, "a name or a list of names")
RANK_PATTERN = by_module(RANK, "rank or list of ranks")
ALPHA_PATTERN = by_module(ALPHA, "alpha or list of alphas")
NUM_EXPERTS_PATTERN = by_module(integer(1), "integer >= 1")
TOP_K_PATTERN = by_module(optional(integer(1)), "integer >= 1 or null")
MODULE_NAMES = list_of(NAME_PATTERN, "a list of module names")
MODULE_PATHS = list_of(NAME, "a list of module paths")
