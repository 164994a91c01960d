"""From any readable layout to any writable one."""

import os
from collections.abc import Collection
from typing import Any

from interop.checkpoint import opened, write


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str = "native",
    dialect: str | None = None,
    allow_loss: Collection[str] = (),
    duplicates: bool = False,
    **options: Any,
) -> None:
    """Reads `source` (layout `dialect`, or detected; options as for `read`) and writes it to `target` in layout `to`.

    One tensor is in memory at a time, except with .bin and .npz files, which are read and written as a whole.
    `allow_loss` and `duplicates` as for `write`.

    Raises:
        CheckpointError, ConfigError: unreadable, or the target layout cannot express something.
    """
    with opened(source, dialect, **options) as adapter:
        write(adapter, target, to, allow_loss=allow_loss, duplicates=duplicates)
