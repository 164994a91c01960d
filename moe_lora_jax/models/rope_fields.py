"""Rotary parameters out of config.json, old and new spelling, with nothing silently ignored.

Before transformers 5: `rope_theta` and `rope_scaling` (null or {"rope_type" or "type", "factor", ...}) at the top
level, and in Gemma 3 also `rope_local_base_freq` for its sliding layers. From transformers 5: `rope_parameters`, which
holds `rope_theta` too, and which Gemma 3 nests by attention kind.
"""

import math
from collections.abc import Mapping
from typing import Any

from moe_lora_jax.models.families import FULL, SLIDING, Family
from moe_lora_jax.models.fields import Fields, is_positive_number
from moe_lora_jax.models.rope import RopeConfig

_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}
_OTHERS: Mapping[str, tuple[str, ...]] = {"yarn": ("truncate",), "longrope": ("short_factor", "long_factor")}
_OF_QUERIES = ("llama_4_scaling_beta", "original_max_position_embeddings", "max_position_embeddings")


def read_ropes(fields: Fields, family: Family, head_dim: int) -> dict[str, RopeConfig]:
    """The rotary parameters of each attention kind. Problems go to `fields`."""
    ropes = {}
    for kind in (FULL, SLIDING):
        own = Fields(fields.stated, fields.values)
        ropes[kind] = _read_kind(own, family, kind, head_dim)
        fields.problems += [problem for problem in own.problems if problem not in fields.problems]
    return ropes


def _read_kind(fields: Fields, family: Family, kind: str, head_dim: int) -> RopeConfig:
    where, table = _stated_table(fields, family, kind)
    stated_type = table.get("rope_type") or table.get("type") or "default"
    if not isinstance(stated_type, str) or stated_type not in family.rope_types:
        known_types = ", ".join(sorted(family.rope_types))
        fields.refuse(f"{where}.rope_type", f"found {stated_type!r}, expected one of {known_types}")
        return RopeConfig(theta=1.0)
    rope_type = family.rope_types[stated_type]

    share = _share(fields, family, where, table, head_dim)
    names = _NUMBERS[rope_type] + (_OF_QUERIES[:2] if family.scales_queries else ())
    numbers: dict[str, Any] = {"rope_theta": _theta(fields, family, kind, where, table)}
    for name in names:
        numbers[name] = table.get(name)
        if name == "original_max_position_embeddings":
            stated = _agreeing(fields, name, where, table, name)
            # transformers falls back to the full context when the pretraining length is not stated.
            numbers[name] = fields.get("max_position_embeddings") if stated is None else stated
    optional = {name: table[name] for name in _OPTIONAL.get(rope_type, ()) if table.get(name) is not None}
    for name, value in (numbers | optional).items():
        if not is_positive_number(value):
            fields.refuse(f"{where}.{name}", f"found {value!r}, expected a positive number")
    allowed = {"rope_type", "type", *numbers, *_OPTIONAL.get(rope_type, ()), *_OTHERS.get(rope_type, ())}
    allowed |= {"partial_rotary_factor"} | (set(_OF_QUERIES) if family.scales_queries else set())
    for name, value in table.items():
        if name not in allowed and value is not None:
            fields.refuse(f"{where}.{name}", f"found {value!r}, expected no such field with rope_type {stated_type!r}")
    numbers |= optional
    lists: dict[str, Any] = {}
    if rope_type == "longrope":
        lists = {name: _factors(fields, where, table, name, int(head_dim * share) // 2) for name in _OTHERS[rope_type]}
    if rope_type == "yarn":
        numbers["truncate"] = _truncate(fields, family, where, table)
    if rope_type in _OPTIONAL:  # their formulas divide by the logarithms of these
        for name in ("rope_theta", "original_max_position_embeddings"):
            if is_positive_number(numbers[name]) and numbers[name] <= 1:
                fields.refuse(f"{where}.{name}", f"found {numbers[name]!r}, expected more than 1")
    if fields.problems:
        return RopeConfig(theta=1.0)

    if rope_type == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        high, low = numbers["high_freq_factor"], numbers["low_freq_factor"]
        fields.refuse(f"{where}.high_freq_factor", f"found {high}, expected more than low_freq_factor {low}")
    if rope_type in _OPTIONAL:
        numbers["attention_factor"] = _attention_factor(fields, rope_type, numbers)
    theta, beta = numbers.pop("rope_theta"), numbers.pop("llama_4_scaling_beta", 0.0)
    used = {name: value for name, value in numbers.items() if name not in ("mscale", "mscale_all_dim")}
    return RopeConfig(theta=theta, share=share, rope_type=rope_type, query_beta=beta, **used, **lists)


def _theta(fields: Fields, family: Family, kind: str, where: str, table: Mapping[str, Any]) -> Any:
    default = family.rope_theta[kind]
    if not family.rope_per_kind or kind == FULL:
        theta = _agreeing(fields, "rope_theta", where, table, "rope_theta")
    elif family.local_theta_field is not None:
        theta = _agreeing(fields, family.local_theta_field, where, table, "rope_theta")
    else:
        theta, top = table.get("rope_theta"), fields.get("rope_theta")
        if theta is None and top not in (None, default):
            # transformers 5 reads it for full layers alone, and before it was for all
            fields.refuse("rope_theta", f"found {top!r}, expected {default} or rope_parameters, for each kind of layer")
    return default if theta is None else theta


def _share(fields: Fields, family: Family, where: str, table: Mapping[str, Any], head_dim: int) -> float:
    """Of a head's components, how many are rotated."""
    share = table.get("partial_rotary_factor")
    if "partial_rotary_factor" in family.reads:
        share = _agreeing(fields, "partial_rotary_factor", where, table, "partial_rotary_factor")
    if share is None or share == 1:
        return 1.0
    if "partial_rotary_factor" not in family.reads:
        fields.refuse(f"{where}.partial_rotary_factor", f"found {share!r}, expected None or 1")
    elif not is_positive_number(share) or share > 1 or int(head_dim * share) % 2 or int(head_dim * share) < 2:
        wanted = f"at most 1, for an even number of the {head_dim} components of a head"
        fields.refuse("partial_rotary_factor", f"found {share!r}, expected {wanted}")
    else:
        return float(share)
    return 1.0


def _factors(fields: Fields, where: str, table: Mapping[str, Any], name: str, size: int) -> tuple[float, ...]:
    value = table.get(name)
    if not isinstance(value, list | tuple) or len(value) != size or not all(map(is_positive_number, value)):
        fields.refuse(f"{where}.{name}", f"found {value!r}, expected {size} positive numbers, one for each frequency")
        return ()
    return tuple(value)


def _truncate(fields: Fields, family: Family, where: str, table: Mapping[str, Any]) -> bool:
    """transformers does not find it where the parameters are nested."""
    value, allowed = table.get("truncate", True), (True,) if family.rope_per_kind else (True, False)
    if not isinstance(value, bool) or value not in allowed:
        fields.refuse(f"{where}.truncate", f"found {value!r}, expected one of {allowed}")
    return value


def _attention_factor(fields: Fields, rope_type: str, numbers: Mapping[str, Any]) -> float:
    """What is stated, or what transformers infers."""
    if "attention_factor" in numbers:
        return float(numbers["attention_factor"])
    if rope_type == "yarn":
        factor, one, other = numbers["factor"], numbers.get("mscale"), numbers.get("mscale_all_dim")
        both = one is not None and other is not None
        return _mscale(factor, one) / _mscale(factor, other) if both else _mscale(factor, 1)
    original = numbers["original_max_position_embeddings"]
    factor = numbers.get("factor") or fields.number("max_position_embeddings") / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _mscale(factor: float, by: float | None) -> float:
    return 1.0 if factor <= 1 or by is None else 0.1 * by * math.log(factor) + 1.0


def _stated_table(fields: Fields, family: Family, kind: str) -> tuple[str, Mapping[str, Any]]:
    """The dict that describes this kind of layer, and the field's name for messages."""
    old, new = fields.get("rope_scaling"), fields.get("rope_parameters")
    if not old and new is None:
        new = family.rope_default
    for name, table in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(table, Mapping | None):
            fields.refuse(name, f"found {table!r}, expected an object or null")
            return name, {}
    if old and new and dict(old) != dict(new):
        fields.refuse("rope_scaling", f"found {dict(old)}, expected that of rope_parameters, {dict(new)}, or nothing")
    if not new:
        return "rope_scaling", (old or {}) if kind == FULL or not family.rope_per_kind else {}
    nested = FULL in new or SLIDING in new
    if nested != family.rope_per_kind:
        expected = f"nested under {FULL} and {SLIDING}" if family.rope_per_kind else "as one flat object"
        fields.refuse("rope_parameters", f"found {dict(new)}, expected it {expected}")
        return "rope_parameters", {}
    if not nested:
        return "rope_parameters", new
    of_kind = new.get(kind) or {}
    if not isinstance(of_kind, Mapping):
        fields.refuse(f"rope_parameters.{kind}", f"found {of_kind!r}, expected an object")
        of_kind = {}
    return f"rope_parameters.{kind}", of_kind


def _agreeing(fields: Fields, outer: str, where: str, table: Mapping[str, Any], inner: str) -> Any:
    """A value that may stand at the top level, in the table, or in both if equal."""
    top, nested = fields.get(outer), table.get(inner)
    if top is not None and nested is not None and top != nested:
        fields.refuse(outer, f"found {top!r}, expected {nested!r} as in {where}.{inner}")
    return top if nested is None else nested
