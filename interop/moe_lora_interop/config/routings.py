"""The routing rules of other people by name: registered by their classes, or found at entry points `moe_lora.routings`.

A registered rule stands in a config in the place of scoring_func, of threshold, top_p and entropy_threshold, and of
norm_topk_prob:

    scores, gates = rule.jax(logits, top_k)        likewise rule.torch and rule.numpy

    logits    z / T, [token, expert], fp32 (float64 in numpy)
    top_k     of the module, or None for no limit
    scores    finite and >= 0, for the balancing losses, which divide them by their sum; shape and dtype of the logits
    gates     finite: the weights g before routed_scaling_factor, 0 where an expert is not kept; likewise

Each token is decided by itself, and keeps at most top_k experts. `moe_lora_interop.testing.check_routing` tries all
this, and whether the functions agree.
"""

import dataclasses
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, NamedTuple, TypeVar

from moe_lora_interop.errors import ConfigError, did_you_mean

GROUP = "moe_lora.routings"
FRAMEWORKS = ("jax", "torch", "numpy")
_MARK = "_moe_lora_routing"
_registered: dict[tuple[str, int], type] = {}
Rule = TypeVar("Rule", bound=type)


class Registration(NamedTuple):
    """What a class was registered as."""

    name: str
    version: int
    takes_top_k: bool


def register_routing(name: str, *, version: int = 1, takes_top_k: bool = True) -> Callable[[Rule], Rule]:
    """Registers a frozen dataclass as the routing of this name, where its module is imported.

        @register_routing("mine")
        @dataclass(frozen=True)
        class Mine:
            power: float = 2.0

            def jax(self, logits, top_k): ...  # -> scores, gates
            def torch(self, logits, top_k): ...
            def numpy(self, logits, top_k): ...

    `MoeLoraConfig(routing=Mine(power=3.0))` is saved as {"name": "mine", "version": 1, "power": 3.0}. A process that
    has not imported the module finds it if an installed package declares `mine = "its.module"` in the entry-point group
    `moe_lora.routings`. A framework without its function is refused where it would be needed.

    The functions get and give arrays [token, expert]. logits: fp32 (float64 in numpy), the temperature applied; top_k:
    of the module, or None for no limit. scores: >= 0, for the balancing losses, which divide them by their sum. gates:
    the weights before routed_scaling_factor, 0 where an expert is not kept. No token sees another, and none keeps more
    than top_k experts; one that does gets nan.

    A class of the same module and name may be defined anew, as notebooks do: the newest counts.

    Args:
        name: lower-case letters, digits and "_".
        version: of the rule. A rule that computes something else, or has other fields, is another version: register its
            class beside the former one, so that older files go on meaning the same.
        takes_top_k: False for a rule that has no use for top_k; a config with both is then refused.

    Raises:
        ConfigError: the class is no frozen dataclass with a default for every field, or has none of the functions, or
            another class has this name and version.
    """

    def register(rule: Rule) -> Rule:
        problems = [] if re.fullmatch("[a-z][a-z0-9_]*", name) else [f"name: found {name!r}, expected [a-z][a-z0-9_]*"]
        if type(version) is not int or version < 1:
            problems.append(f"version: found {version!r}, expected an integer >= 1")
        problems += _class_problems(rule)
        other = _registered.get((name, version))
        if other is not None and _place(other) != _place(rule):
            problems.append(f"name: {name!r}, version {version}, is {_place(other)}; expected another name or version")
        if problems:
            raise ConfigError(f"cannot register {_place(rule)} as a routing", problems)
        setattr(rule, _MARK, Registration(name, version, takes_top_k))
        _registered[name, version] = rule
        return rule

    return register


def registration(kind: type) -> Registration | None:
    """What this very class was registered as."""
    return vars(kind).get(_MARK)


def is_rule(value: Any) -> bool:
    """Whether it is of a class that is registered now."""
    found = registration(type(value))
    return found is not None and _registered.get(found[:2]) is type(value)


def find_routing(name: str, version: int | None = None) -> type:
    """The class that is registered under this name, and version; None: the newest.

    Raises:
        ConfigError: there is none.
    """
    versions = _versions(name)
    if version not in (*versions, None) or not versions:
        _load(name)
        versions = _versions(name)
    wanted = versions[-1] if version is None and versions else version
    if wanted in versions:
        return _registered[name, wanted]
    if not versions or wanted is None:
        known = sorted({name for name, _ in _registered})
        problem = (
            f"routing: {name!r} is not registered, found {', '.join(known) or 'none'}{did_you_mean(name, known)}; "
            f"import the module that calls register_routing({name!r}), or install a package with an entry point "
            f"{name!r} in the group {GROUP}"
        )
    else:
        where, numbers = _registered[name, versions[-1]].__module__, ", ".join(map(str, versions))
        advice = f"upgrade {where}" if wanted > versions[-1] else f"register the former rule beside it in {where}"
        problem = f"routing: found version {wanted} of {name!r}, registered: {numbers}; {advice}"
    raise ConfigError("unknown routing", [problem])


def _versions(name: str) -> list[int]:
    return sorted(version for known, version in _registered if known == name)


def _load(name: str) -> None:
    """Imports what installed packages declare under this name: a file can only pick among those."""
    for point in entry_points(group=GROUP, name=name):
        try:
            point.load()
        except (ImportError, AttributeError) as error:
            problem = f"routing: {name!r} is declared as {point.value!r}, which cannot be imported: {error}"
            raise ConfigError("unknown routing", [problem]) from error


def _class_problems(rule: type) -> list[str]:
    parameters = vars(rule).get("__dataclass_params__")
    if parameters is None or not (parameters.frozen and parameters.eq):
        return ["found no frozen dataclass, expected @dataclass(frozen=True) below @register_routing"]
    fields = dataclasses.fields(rule)
    problems = [f"{f.name}: found as a field, expected another name" for f in fields if f.name in ("name", "version")]
    problems += [
        f"{f.name}: found {'no default' if f.default is dataclasses.MISSING else repr(f.default)}, expected a default "
        "that is a finite number, a string, true, false or a tuple of such"
        for f in fields
        if not is_plain(f.default)
    ]
    if not any(callable(getattr(rule, framework, None)) for framework in FRAMEWORKS):
        problems.append(f"found no function, expected a method {', '.join(FRAMEWORKS[:-1])} or {FRAMEWORKS[-1]}")
    if (found := registration(rule)) is not None:
        problems.append(f"found registered as {found.name!r}, version {found.version}, expected a class of its own")
    return problems


def is_plain(value: Any) -> bool:
    """Whether JSON has it, and it can be hashed, lists as tuples."""
    if isinstance(value, list | tuple):
        return all(is_plain(v) and not isinstance(v, list | tuple) for v in value)
    return isinstance(value, bool | str) or (isinstance(value, int | float) and abs(value) < 1e300)


def _place(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
