"""From what a config says of a registered routing to its rule and back, and what the rule decides."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moe_lora_interop.config.routings import find_routing, is_plain, registration
from moe_lora_interop.errors import ConfigError, did_you_mean


def routing_dict(rule: Any) -> dict[str, Any]:
    """What a config says of the rule: {"name": ..., "version": ..., and its fields}."""
    found = registration(type(rule))
    assert found is not None
    fields = ((f.name, getattr(rule, f.name)) for f in dataclasses.fields(rule))
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in fields}
    return {"name": found.name, "version": found.version, **plain}


def routing_rule(said: Mapping[str, Any]) -> Any:
    """The rule that a config's `routing` says, with defaults for the fields that it leaves out.

    Raises:
        ConfigError: the name or version is not registered, or the fields are not the rule's.
    """
    kind = find_routing(said["name"], said["version"])
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    fields = {key: value for key, value in said.items() if key not in ("name", "version")}
    problems = []
    for key, value in fields.items():
        if key not in defaults:
            problems.append(f"routing: {key}: unknown field of {said['name']!r}{did_you_mean(key, defaults)}")
        elif not _is_like(defaults[key], value):
            problems.append(f"routing: {key}: found {value!r}, expected {_like(defaults[key])}")
    if not problems:
        try:
            return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()})
        except (ValueError, TypeError) as error:  # of the class's own checks
            problems = [f"routing: {problem}" for problem in getattr(error, "problems", [str(error)])]
    raise ConfigError("invalid routing", problems)


def rule_of(said: Any) -> tuple[Any, list[str]]:
    """The rule of a config's `routing`, or None, and what is wrong with it."""
    if not is_routing(said):
        return None, []
    try:
        return routing_rule(said), []
    except ConfigError as error:
        return None, list(error.problems)


def refuses_top_k(said: Mapping[str, Any] | None) -> bool:
    """Whether a config's `routing` is one that has no use for top_k; not if it is none, or is not registered."""
    if said is None:
        return False
    try:
        found = registration(find_routing(said["name"], said["version"]))
    except ConfigError:  # `rule_of` says so
        return False
    return found is not None and not found.takes_top_k


def is_routing(value: Any) -> bool:
    """Whether it has the form of a config's `routing`."""
    if not isinstance(value, dict) or not all(map(is_plain, value.values())):
        return False
    version = value.get("version")
    return isinstance(value.get("name"), str) and type(version) is int and version >= 1


def rule_in_words(rule: Any, top_k: int | None) -> str:
    """For example "mine (version 1, k=2, power=3)"."""
    name, version, *fields = routing_dict(rule).items()
    words = [f"k={top_k}"] if top_k is not None else []
    words += [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in fields]
    return f"{name[1]} ({', '.join([f'version {version[1]}', *words])})"


def function_of(rule: Any, framework: str) -> Callable[..., Any]:
    """The rule's function for a framework: "jax", "torch" or "numpy".

    Raises:
        ConfigError: it has none.
    """
    function = getattr(rule, framework, None)
    if function is None:
        found = registration(type(rule))
        problem = f"routing: {found.name if found else rule!r} has no function for {framework}"
        problem += f", expected a method {framework}(self, logits, top_k)"
        raise ConfigError("the routing cannot be computed here", [problem])
    return function


def decision(rule: Any, framework: str, logits: Any, top_k: int | None) -> tuple[Any, Any]:
    """The scores and gates of logits [..., expert], arrays of the framework; both like the logits.

    Raises:
        ConfigError: the rule has no function for the framework, or one that gives something else.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    found = function_of(rule, framework)(rows, top_k)
    if not isinstance(found, tuple) or len(found) != 2:
        problems = [f"found {type(found).__name__}, expected two arrays, scores and gates"]
    else:
        named = zip(("scores", "gates"), map(_form, found), strict=True)
        problems = [f"{word}: found {form}, expected {_form(rows)}" for word, form in named if form != _form(rows)]
    if problems:
        where = f"{type(rule).__name__}.{framework}"
        raise ConfigError("a routing gives what it must not", [f"{where}: {problem}" for problem in problems])
    return found[0].reshape(logits.shape), found[1].reshape(logits.shape)


def _form(array: Any) -> str:
    if not hasattr(array, "shape"):
        return type(array).__name__
    return f"{str(array.dtype).removeprefix('torch.')} {list(array.shape)}"


def _is_like(default: Any, value: Any) -> bool:
    """Whether the value can stand where this default stands."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    kind = {float: int | float, tuple: list | tuple}.get(type(default), type(default))
    return isinstance(value, kind)


def _like(default: Any) -> str:
    words = {bool: "true or false", str: "a string", int: "an integer", float: "a finite number"}
    return words.get(type(default), "a list")
