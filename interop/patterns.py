"""Values that differ by module, as {regular expression: value} in PEFT's manner, independent of the entries' order."""

import re
from collections.abc import Mapping
from typing import Any


def first_match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule (peft.utils.other.get_pattern_key): the first key that matches the end of the path."""
    return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module)), default)


def pattern_for(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A short pattern that gives every module its value and others `default`; no two of its keys match one module."""
    pattern: dict[str, Any] = {}
    left = {m: v for m, v in values.items() if v != default}
    for key_of in (_last_part, _layer):
        for key in sorted({k for m in left if (k := key_of(m))}):
            alike = [m for m in values if key_of(m) == key]
            found = [values[m] for m in alike]
            if all(m in left for m in alike) and all(v == found[0] for v in found):
                pattern[key] = found[0]
                left = {m: v for m, v in left.items() if m not in alike}
    return pattern | {f"^{re.escape(m)}": v for m, v in left.items()}  # ^: not the end of a longer path


def _last_part(module: str) -> str:
    return re.escape(module.rsplit(".", 1)[-1])


def layer_of(module: str) -> int | None:
    """The first number in a module path."""
    found = re.search(r"\.(\d+)\.", module)
    return int(found[1]) if found else None


def _layer(module: str) -> str | None:
    found = re.search(r"([^.]+)\.(\d+)\.", module)
    return rf"{re.escape(found[1])}\.{found[2]}\..*" if found else None
