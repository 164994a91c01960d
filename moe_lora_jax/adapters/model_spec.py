"""What a model of another program calls its layers, and which layer classes of its own it has."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_lora_interop.errors import ConfigError
from moe_lora_jax.layers.linear_maps import LayerTypes

Names = tuple[tuple[str, str], ...]
"""Pairs (template of an NNX path, template of a module name)."""

_FIELD = re.compile(r"{(\w+)}")


@dataclass(frozen=True)
class ModelSpec:
    """What `apply_moe_lora` and `load_adapter` need to know of a model that `load_base_model` did not make.

    Example:
        >>> ModelSpec(names={"layers.{l}.attn.{p}_proj": "model.layers.{l}.self_attn.{p}_proj"})

    Args:
        names: {template of an NNX path: template of the module's name in the Hugging Face model}. A field in braces is
            a part of a path, without dots, and stands once on either side. Configs and files then use these names, so
            that PEFT finds the modules. Empty: the path is the name.
        layers: {a layer class of the model's own: function from such a layer to its `LinearMap`}. These come before
            the classes of Flax.

    Raises:
        ConfigError: a template whose fields differ from those of its other side, or stand twice.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    layers: LayerTypes = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        for path, name in self.names.items():
            ours, theirs = sorted(_FIELD.findall(path)), sorted(_FIELD.findall(name))
            if ours != theirs or len(set(ours)) != len(ours):
                problems.append(f"names: found {path!r} -> {name!r}, expected the same fields once on both sides")
        if problems:
            raise ConfigError("invalid ModelSpec", problems)


def module_name(path: str, names: Names) -> str | None:
    """The module's name at an NNX path, or None if no template fits.

    Raises:
        ConfigError: two templates fit and give different names.
    """
    found = {name: template for template, name in ((t, _translated(path, t, n)) for t, n in names) if name is not None}
    if len(found) > 1:
        problem = f"{path}: " + " and ".join(f"{template!r} says {name!r}" for name, template in found.items())
        raise ConfigError("names are ambiguous", [f"{problem}, expected one name"])
    return next(iter(found), None)


def _translated(path: str, template: str, name: str) -> str | None:
    pattern = _FIELD.sub(r"(?P<\1>[^.]+)", re.sub(r"[^\w{}]", lambda c: re.escape(c[0]), template))
    found = re.fullmatch(pattern, path)
    return None if found is None else _FIELD.sub(lambda part: found[part[1]], name)
