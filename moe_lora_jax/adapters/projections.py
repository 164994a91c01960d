"""Modules as a grid: one group per projection, one row per layer."""

import re
from collections.abc import Iterable

from moe_lora_interop.config.modules import traversal_order
from moe_lora_interop.errors import ConfigError

Grid = dict[str, dict[int | None, str]]


def by_projection(modules: Iterable[str]) -> Grid:
    """{projection: {layer number: module path}}, both in the model's order.

    A projection is called by the last part of its path, or by all of it where two would get the same name; a path
    without a number is a projection with the layer None.
    """
    found: dict[str, dict[int | None, str]] = {}
    for module in _ordered(modules):
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
        name = module if number is None else f"{module[: number.start()]}.*.{module[number.end() :]}"
        found.setdefault(name, {})[int(number[1]) if number else None] = module
    short = [name.rpartition(".")[2] for name in found]
    return {s if short.count(s) == 1 else name: rows for s, (name, rows) in zip(short, found.items(), strict=True)}


def _ordered(modules: Iterable[str]) -> list[str]:
    names = sorted(modules, key=lambda m: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", m)])
    try:
        return traversal_order(names)
    except ConfigError:  # feed-forward blocks, or names that transformers does not use
        return names
