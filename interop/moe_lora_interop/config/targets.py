"""Which module paths a config targets: PEFT's matching rules, without a framework.

Source: peft.tuners.tuners_utils.check_target_module_exists (peft 0.21.2).
"""

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from moe_lora_interop.config.patterns import match_start, matches
from moe_lora_interop.errors import ConfigError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Targets:
    """`target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern` as one predicate."""

    target_modules: str | list[str] | None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def select(
        self, linears: Iterable[str], heads: Iterable[str] = ("lm_head",), fused: Iterable[str] = ()
    ) -> list[str]:
        """The sorted paths among `linears` that are targeted.

        Args:
            heads: what "all-linear" leaves out.
            fused: parameters that hold all experts of a layer of the base model, for messages.

        Raises:
            ConfigError: target_modules is null, a name in it matches nothing (with the nearest names that exist), or
                another field takes away all that it names.
        """
        linears, heads, fused = list(linears), set(heads), list(fused)
        if self.target_modules is None:
            raise ConfigError(
                "no target_modules", [f"target_modules: found null, expected some of {_last_parts(linears)}"]
            )
        chosen = sorted(m for m in linears if self.matches(m, heads))
        problems = [] if chosen else self._emptied(linears, heads)
        for target in self._unmatched(linears, bool(chosen or problems)):
            names = [target] if isinstance(self.target_modules, list) else target
            problems.append(f"{target!r}: {_fused(names, fused) or _near(target, linears)}")
        if problems:
            raise ConfigError("target_modules match nothing", problems)
        return chosen

    def _emptied(self, linears: list[str], heads: set[str]) -> list[str]:
        """The fields that take away every layer that target_modules names, each by itself."""
        problems = []
        for field in ("exclude_modules", "modules_to_save", "layers_to_transform"):
            value = getattr(self, field)
            without = dataclasses.replace(self, **{field: None})
            named = [m for m in linears if value is not None and without.matches(m, heads)]
            if named:
                problems.append(
                    f"{field}: found {value!r}, which leaves none of the {len(named)} layers that target_modules "
                    f"{self.target_modules!r} names"
                )
        return problems

    def matches(self, module: str, heads: Collection[str] = ()) -> bool:
        """Whether `module` is targeted, taking it to be a linear layer."""
        if self.exclude_modules and _named(self.exclude_modules, module):
            return False
        if any(match_start(rf"(^|.*\.){m}($|\..*)", module) for m in self.modules_to_save or ()):
            return False
        if self.is_all_linear:
            return module not in heads
        assert self.target_modules is not None
        if not _named(self.target_modules, module):
            return False
        if self.layers_to_transform is None or module in self.target_modules:
            return True
        wanted = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        return self._layer(module) in wanted

    def _layer(self, module: str) -> int | None:
        """The first numbered path segment (after one of layers_pattern, if given)."""
        if not self.layers_pattern:
            found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
            return int(found[1]) if found else None
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        found_by = (match_start(rf"(?:^|.*?\.){p}\.(\d+)\.", module) for p in patterns)
        return next((int(m[1]) for m in found_by if m), None)

    def _unmatched(self, linears: list[str], explained: bool) -> list[str]:
        """The targets that name no layer; all of them if nothing is chosen and nothing has `explained` that."""
        if isinstance(self.target_modules, list):
            exact = set(linears)
            found = {t for t in self.target_modules if t in exact or any(_named([t], m) for m in linears)}
            missing = [t for t in self.target_modules if t not in found and not self._excluded(t, linears)]
            return missing or ([] if explained else self.target_modules or ["[]"])
        return [] if explained else [str(self.target_modules)]

    def _excluded(self, target: str, linears: list[str]) -> bool:
        """Whether a target that names none of the modules is one that was left out; these may be an adapter's alone."""
        if not self.exclude_modules:
            return False
        places = {target, *(f"{m.rpartition('.')[0]}.{target}" for m in linears)}
        return any(_named(self.exclude_modules, place) for place in places)


def _named(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return matches(names, module)
    return module in names or any(module.endswith(f".{n}") for n in names)


def _fused(names: str | list[str], fused: list[str]) -> str | None:
    """What to say of a target that names experts in one parameter, or their module; None if it does not."""
    named = [p for p in fused if _named(names, p) or _named(names, p.rpartition(".")[0])]
    if not named:
        return None
    more = f" (and {len(named) - 1} more)" if len(named) > 1 else ""
    return (
        f"{named[0]}{more} holds all experts of a layer of the base model in one fused parameter, which no adapter of "
        "linear layers can wrap; target linear layers, for example those of the attention"
    )


def _last_parts(linears: list[str]) -> str:
    return ", ".join(sorted({m.rsplit(".", 1)[-1] for m in linears})) or "(the model has no linear layers)"


def _near(name: str, linears: list[str]) -> str:
    last = sorted({m.rsplit(".", 1)[-1] for m in linears})
    near = difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"no linear layer of this name is targeted; {hint}This model has {', '.join(last) or 'no linear layers'}"
