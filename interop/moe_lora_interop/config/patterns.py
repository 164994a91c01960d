"""Values that differ by module, as {regular expression: value} in PEFT's manner, independent of the entries' order."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import regex

from moe_lora_interop.disk.limits import MATCH_SECONDS
from moe_lora_interop.errors import ConfigError

_NUMBERED = r"(?<![^.])([^.]+)\.(\d+)\."


def matches(pattern: str, text: str) -> bool:
    """Whether all of `text` matches. As `re.fullmatch`, which could take for ever on "(a+)+b" and the like.

    Raises:
        ConfigError: no result in `MATCH_SECONDS`, or a pattern that `re` accepts and the package `regex` does not.
    """
    return _matched(regex.fullmatch, pattern, text) is not None


def match_start(pattern: str, text: str) -> "regex.Match[str] | None":
    """As `re.match`, and as `matches`."""
    return _matched(regex.match, pattern, text)


def _matched(function: Any, pattern: str, text: str) -> Any:
    try:
        return function(pattern, text, timeout=MATCH_SECONDS)
    except TimeoutError:
        problem = f"{pattern!r}: no result in {MATCH_SECONDS} s on {text!r}, expected a pattern that backtracks less"
    except regex.error as error:
        problem = f"{pattern!r}: {error}"
    raise ConfigError("unusable regular expression", [problem])


def first_match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule (peft.utils.other.get_pattern_key): the first key that matches the end of the path."""
    return next((v for k, v in pattern.items() if match_start(rf"(.*\.)?({k})$", module)), default)


def pattern_for(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A short pattern that gives every module its value and others `default`; no two of its keys match one module."""
    pattern: dict[str, Any] = {}
    left = {m: v for m, v in values.items() if v != default}
    for key_of in (_last_part, _layer):
        groups: dict[str, list[str]] = {}
        for module in values:
            if (key := key_of(module)) is not None:
                groups.setdefault(key, []).append(module)
        matching = Counter(key for m in values for key in (_layers(m) if key_of is _layer else ()))
        for key, alike in sorted(groups.items()):
            if matching[key] <= len(alike) and all(m in left and values[m] == values[alike[0]] for m in alike):
                pattern[key] = values[alike[0]]
                for module in alike:
                    del left[module]
    return pattern | {f"^{re.escape(m)}": v for m, v in left.items()}  # ^: not the end of a longer path


def _last_part(module: str) -> str:
    return re.escape(module.rsplit(".", 1)[-1])


def layer_of(module: str) -> int | None:
    """The first number in a module path."""
    found = re.search(r"\.(\d+)\.", module)
    return int(found[1]) if found else None


def _layer(module: str) -> str | None:
    found = re.search(_NUMBERED, module)
    return rf"{re.escape(found[1])}\.{found[2]}\..*" if found else None


def _layers(module: str) -> set[str]:
    """The keys of `_layer` that match the module: of a part with layers of its own there may be several."""
    return {rf"{re.escape(name)}\.{number}\..*" for name, number in re.findall(rf"(?={_NUMBERED})", module)}
