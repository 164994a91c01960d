"""Rotary parameters out of config.json, old and new spelling, with nothing silently ignored.

Before transformers 5: `rope_theta` and `rope_scaling` (null or {"rope_type" or "type", "factor", ...}) at the top
level, and in Gemma 3 also `rope_local_base_freq` for its sliding layers. From transformers 5: `rope_parameters`, which
holds `rope_theta` too, and which Gemma 3 nests by attention kind.
"""

from collections.abc import Mapping
from typing import Any

from moe_lora_jax.models.families import FULL, SLIDING, Family
from moe_lora_jax.models.fields import Fields, is_positive_number
from moe_lora_jax.models.rope import RopeConfig

_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_ropes(fields: Fields, family: Family) -> dict[str, RopeConfig]:
    """The rotary parameters of each attention kind. Problems go to `fields`."""
    return {kind: _read_kind(fields, family, kind) for kind in (FULL, SLIDING)}


def _read_kind(fields: Fields, family: Family, kind: str) -> RopeConfig:
    where, table = _stated_table(fields, family, kind)
    theta_field = "rope_local_base_freq" if family.rope_per_kind and kind == SLIDING else "rope_theta"
    theta = _agreeing(fields, theta_field, where, table, "rope_theta")
    rope_type = table.get("rope_type") or table.get("type") or "default"
    if not isinstance(rope_type, str) or rope_type not in _PARAMETERS:
        _refuse_once(
            fields, f"{where}.rope_type", f"found {rope_type!r}, expected one of {', '.join(sorted(_PARAMETERS))}"
        )
        return RopeConfig(theta=1.0)

    allowed = {"rope_type", "type", "rope_theta", *_PARAMETERS[rope_type]}
    for name, value in table.items():
        inert = value is None or (name == "partial_rotary_factor" and value == 1)
        if name not in allowed and not inert:
            _refuse_once(
                fields, f"{where}.{name}", f"found {value!r}, expected no such field with rope_type {rope_type!r}"
            )

    numbers: dict[str, Any] = {"theta": family.rope_theta[kind] if theta is None else theta}
    for name in _PARAMETERS[rope_type]:
        numbers[name] = table.get(name)
        if name == "original_max_position_embeddings":
            stated = _agreeing(fields, name, where, table, name)
            # transformers falls back to the full context when the pretraining length is not stated.
            numbers[name] = fields.get("max_position_embeddings") if stated is None else stated
    wrong = {name: value for name, value in numbers.items() if not is_positive_number(value)}
    for name, value in wrong.items():
        name = {"theta": "rope_theta"}.get(name, name)
        _refuse_once(fields, f"{where}.{name}", f"found {value!r}, expected a positive number")
    if not wrong and rope_type == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        high, low = numbers["high_freq_factor"], numbers["low_freq_factor"]
        _refuse_once(fields, f"{where}.high_freq_factor", f"found {high}, expected more than low_freq_factor {low}")
    return RopeConfig(theta=1.0) if wrong else RopeConfig(rope_type=rope_type, **numbers)


def _stated_table(fields: Fields, family: Family, kind: str) -> tuple[str, Mapping[str, Any]]:
    """The dict that describes this kind of layer, and the field's name for messages."""
    old, new = fields.get("rope_scaling"), fields.get("rope_parameters")
    for name, table in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(table, Mapping | None):
            _refuse_once(fields, name, f"found {table!r}, expected an object or null")
            return name, {}
    if old and new and dict(old) != dict(new):
        _refuse_once(
            fields, "rope_scaling", f"found {dict(old)}, expected that of rope_parameters, {dict(new)}, or nothing"
        )
    if not new:
        return "rope_scaling", (old or {}) if kind == FULL or not family.rope_per_kind else {}
    nested = FULL in new or SLIDING in new
    if nested != family.rope_per_kind:
        expected = f"nested under {FULL} and {SLIDING}" if family.rope_per_kind else "as one flat object"
        _refuse_once(fields, "rope_parameters", f"found {dict(new)}, expected it {expected}")
        return "rope_parameters", {}
    if not nested:
        return "rope_parameters", new
    of_kind = new.get(kind) or {}
    if not isinstance(of_kind, Mapping):
        _refuse_once(fields, f"rope_parameters.{kind}", f"found {of_kind!r}, expected an object")
        of_kind = {}
    return f"rope_parameters.{kind}", of_kind


def _agreeing(fields: Fields, outer: str, where: str, table: Mapping[str, Any], inner: str) -> Any:
    """A value that may stand at the top level, in the table, or in both if equal."""
    top, nested = fields.get(outer), table.get(inner)
    if top is not None and nested is not None and top != nested:
        _refuse_once(fields, outer, f"found {top!r}, expected {nested!r} as in {where}.{inner}")
    return top if nested is None else nested


def _refuse_once(fields: Fields, field: str, why: str) -> None:
    """Both attention kinds usually read the same table; one line is enough."""
    if f"{field}: {why}" not in fields.problems:
        fields.refuse(field, why)
