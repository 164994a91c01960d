"""How a value of our config corresponds to a value of another's: each codec is one correspondence, named once."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig
from moe_lora_interop.config.allowed import LARGEST
from moe_lora_interop.config.patterns import layer_of, match_start, pattern_for
from moe_lora_interop.errors import ConfigError

Values = dict[str, Any]
Ours = Callable[[str, Any, Values, list[str]], None]
Theirs = Callable[[str, MoeLoraConfig, list[str]], Any]


@dataclass(frozen=True)
class Codec:
    """A correspondence between their value and our field.

    Attributes:
        ours: (our field, their value, our values so far (to be added to), module paths).
        theirs: (our field, our config, module paths) -> their value.

    Raises:
        ConfigError: the value has no counterpart.
    """

    ours: Ours
    theirs: Theirs


def _same_ours(name: str, value: Any, ours: Values, modules: list[str]) -> None:
    ours[name] = value


def _same_theirs(name: str, config: MoeLoraConfig, modules: list[str]) -> Any:
    return getattr(config, name)


SAME = Codec(_same_ours, _same_theirs)


def _times_experts_ours(name: str, value: Any, ours: Values, modules: list[str]) -> None:
    experts = ours["num_experts"]
    if name == "r" and (not isinstance(value, int) or value % experts):
        raise ConfigError("r", [f"r: found the total rank {value!r}, expected a multiple of the {experts} experts"])
    ours[name] = value // experts if name == "r" else value / experts


def _times_experts_theirs(name: str, config: MoeLoraConfig, modules: list[str]) -> Any:
    total = getattr(config, name) * config.num_experts
    return round(total) if abs(total - round(total)) < 1e-9 * abs(total) else total


TIMES_EXPERTS = Codec(_times_experts_ours, _times_experts_theirs)
"""Theirs is the total over experts: r, and lora_alpha because s = alpha / r_total."""


def _plus_one_ours(name: str, value: Any, ours: Values, modules: list[str]) -> None:
    ours[name] = value + 1


PLUS_ONE = Codec(_plus_one_ours, lambda name, config, modules: getattr(config, name) - 1)
"""Ours counts one more: a task table has a row 0 that their number of tasks leaves out."""


def _share_ours(name: str, value: Any, ours: Values, modules: list[str]) -> None:
    ours[name] = 1 / ours["num_experts"] if value is None else value


DEFAULT_SHARE = Codec(_share_ours, _same_theirs)
"""Their null means 1 / num_experts."""


def _from_one_null_ours(name: str, value: Any, ours: Values, modules: list[str]) -> None:
    ours[name] = None if value >= 1 else value


def _from_one_null_theirs(name: str, config: MoeLoraConfig, modules: list[str]) -> Any:
    value = getattr(config, name)
    return 1.0 if value is None else value


FROM_ONE_NULL = Codec(_from_one_null_ours, _from_one_null_theirs)
"""Theirs is switched off by any value from 1 on."""


def renamed(names: Mapping[Any, Any]) -> Codec:
    """Their spelling of some values; others are the same."""
    back = {v: k for k, v in names.items()}

    def ours(name: str, value: Any, ours: Values, modules: list[str]) -> None:
        ours[name] = names.get(value, value)

    return Codec(ours, lambda name, config, modules: back.get(getattr(config, name), getattr(config, name)))


_OF_MODULE: dict[str, tuple[str, Callable[[ModuleConfig], Any]]] = {
    "r": ("rank_pattern", lambda sizes: sizes.rank),
    "top_k": ("top_k_pattern", lambda sizes: sizes.top_k),
}


def _per_layer_ours(name: str, value: Any, ours: Values, modules: list[str]) -> None:
    layers = sorted({layer for m in modules if (layer := layer_of(m)) is not None})
    last = _last(layers)
    values = value if isinstance(value, list) else [value] * (1 + last)
    if len(values) <= last or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ConfigError(name, [f"{name}: found {value!r}, expected a number, or one for each of layers 0..{last}"])
    # the config's own value is the largest, so that it is valid beside num_experts, which is the largest too
    ours[name] = max(values)
    ours[_OF_MODULE[name][0]] = pattern_for({m: values[layer_of(m) or 0] for m in modules}, ours[name])


def _per_layer_theirs(name: str, config: MoeLoraConfig, modules: list[str]) -> Any:
    of_layer: dict[int, set[Any]] = {}
    for module, sizes in config.for_modules(modules).items():
        of_layer.setdefault(layer_of(module) or 0, set()).add(_OF_MODULE[name][1](sizes))
    if uneven := [layer for layer, values in of_layer.items() if len(values) > 1]:
        raise ConfigError(name, [f"{name}: differs within layer {uneven[0]}: {sorted(map(str, of_layer[uneven[0]]))}"])
    default = getattr(config, name)
    return [next(iter(of_layer.get(layer, {default}))) for layer in range(1 + _last(of_layer))]


def _last(layers: Collection[int]) -> int:
    """The largest layer number, if a list with an entry for each is possible."""
    last = max(layers, default=0)
    if last > LARGEST:
        raise ConfigError("a layer", [f"layer {last}: expected at most {LARGEST}"])
    return last


PER_LAYER = Codec(_per_layer_ours, _per_layer_theirs)
"""Theirs is a list with one value per transformer layer (or, when reading, one number)."""


def _unscaled_ours(name: str, value: Any, ours: Values, modules: list[str]) -> None:
    ours["r"] = ours["lora_alpha"] = value


def _unscaled_theirs(name: str, config: MoeLoraConfig, modules: list[str]) -> Any:
    value = collapsed(config.r) if isinstance(config.r, list) else config.r
    if isinstance(value, list):
        raise TypeError
    return value


UNSCALED = Codec(_unscaled_ours, _unscaled_theirs)
"""Their rank, with no scaling: ours is lora_alpha / r."""


def _unscaled_pattern_ours(name: str, value: Any, ours: Values, modules: list[str]) -> None:
    ranks = {m: _at_a_dot(value, m, ours["r"]) for m in modules}
    ours["rank_pattern"] = ours["alpha_pattern"] = pattern_for(ranks, ours["r"])


def _at_a_dot(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The rule of older PEFT: the first key that matches all after some dot of the path, or the path as a key."""
    return next((v for k, v in pattern.items() if match_start(rf".*\.{k}$", module)), pattern.get(module, default))


def _unscaled_pattern_theirs(name: str, config: MoeLoraConfig, modules: list[str]) -> Any:
    ranks = {m: sizes.rank for m, sizes in config.for_modules(modules).items()}
    whole = {f"^{re.escape(m)}": m for m in modules}
    default = _unscaled_theirs("r", config, modules)
    return {whole.get(key, key): rank for key, rank in pattern_for(ranks, default).items()}


UNSCALED_PATTERN = Codec(_unscaled_pattern_ours, _unscaled_pattern_theirs)
"""Their ranks by module (see `_at_a_dot`), with no scaling."""


def _per_expert_ours(name: str, value: Any, ours: Values, modules: list[str]) -> None:
    ours[name] = collapsed(value)


def _per_expert_theirs(name: str, config: MoeLoraConfig, modules: list[str]) -> Any:
    value = getattr(config, name)
    return list(value) if isinstance(value, list) else [value] * config.num_experts


PER_EXPERT = Codec(_per_expert_ours, _per_expert_theirs)
"""Theirs is a list with one value per expert, from the experts' own configs."""


def collapsed(values: Collection[Any]) -> Any:
    """One value if all are equal, else the list."""
    items = list(values)
    return items[0] if items and all(v == items[0] for v in items) else items


def _one_for_all_ours(name: str, value: Any, ours: Values, modules: list[str]) -> None:
    values = [sorted(v) if isinstance(v, list) else v for v in value]  # target_modules is a set there
    if any(v != values[0] for v in values):
        raise ConfigError(name, [f"{name}: the experts' configs differ: {values!r}, expected one value"])
    ours[name] = values[0]


ONE_FOR_ALL = Codec(_one_for_all_ours, lambda name, config, modules: [getattr(config, name)] * config.num_experts)
"""Every expert's own config has the same value."""


def _equal_theirs(name: str, config: MoeLoraConfig, modules: list[str]) -> Any:
    value = getattr(config, name)
    if isinstance(value, list):
        raise ConfigError(name, [f"{name}: found {value}, this layout has one for all experts"])
    return [value] * config.num_experts


EQUAL = Codec(_one_for_all_ours, _equal_theirs)
"""As `ONE_FOR_ALL`, of a value that we may have per expert."""


def _if_deep_ours(name: str, value: Any, ours: Values, modules: list[str]) -> None:
    ours[name] = value if ours["router_depth"] > 1 else None


IF_DEEP = Codec(_if_deep_ours, lambda name, config, modules: getattr(config, name) or 2048)
"""Their width of the router's layers has a value even if there is only one layer (X-LoRA's default is 2048)."""


def _last_parts_theirs(name: str, config: MoeLoraConfig, modules: list[str]) -> Any:
    of_layer: dict[int | None, set[str]] = {}
    for module in modules:
        of_layer.setdefault(layer_of(module), set()).add(module.rpartition(".")[2])
    everywhere = set().union(*of_layer.values())
    if uneven := [layer for layer, parts in of_layer.items() if parts != everywhere]:
        missing = ", ".join(sorted(everywhere - of_layer[uneven[0]]))
        raise ConfigError(name, [f"{name}: layer {uneven[0]} lacks {missing}, this layout has the same in every layer"])
    return sorted(everywhere)


LAST_PARTS = Codec(_same_ours, _last_parts_theirs)
"""Theirs knows modules by the last part of their path only, and skips any other name in silence."""
