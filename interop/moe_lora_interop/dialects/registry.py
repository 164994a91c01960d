"""The known layouts by name: ours, those of other packages (entry points `moe_lora.dialects`), and registered ones."""

import functools
from importlib.metadata import entry_points

from moe_lora_interop.dialects import FILE_DIALECTS
from moe_lora_interop.errors import CheckpointError, expected
from moe_lora_interop.rules.dialect import Dialect

GROUP = "moe_lora.dialects"
_registered: dict[str, Dialect] = {}


def register_dialect(dialect: Dialect) -> None:
    """Adds a layout for this process. A package adds one for good by an entry point in the group `moe_lora.dialects`.

    Raises:
        CheckpointError: another layout has this name.
    """
    if _all().get(dialect.name, dialect) != dialect:
        raise CheckpointError("cannot register the layout", [f"{dialect.name!r}: another layout has this name"])
    _registered[dialect.name] = dialect


def file_dialects() -> list[Dialect]:
    """Every layout that a directory can be in."""
    return list(_all().values())


def dialect_named(name: str) -> Dialect:
    """The layout of this name.

    Raises:
        CheckpointError: there is none; the known ones are listed.
    """
    known = _all()
    if name not in known:
        raise CheckpointError("unknown layout", [f"found {name!r}, {expected(name, known)}"])
    return known[name]


def _all() -> dict[str, Dialect]:
    return {d.name: d for d in (*FILE_DIALECTS, *_installed(), *_registered.values())}


@functools.cache
def _installed() -> tuple[Dialect, ...]:
    """Those of other packages; searched once, because that takes longer than reading a small adapter."""
    return tuple(point.load() for point in entry_points(group=GROUP))
