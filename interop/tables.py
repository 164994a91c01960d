"""The known layouts by name."""

from interop.dialects import JAX_TREE, NATIVE
from interop.errors import CheckpointError
from interop.rules import Dialect

FILE_DIALECTS = (NATIVE,)
DIALECTS = {d.name: d for d in (*FILE_DIALECTS, JAX_TREE)}


def dialect_named(name: str) -> Dialect:
    """Raises CheckpointError for an unknown name, listing the known ones."""
    if name not in DIALECTS:
        raise CheckpointError("unknown layout", [f"found {name!r}, expected one of {', '.join(sorted(DIALECTS))}"])
    return DIALECTS[name]
