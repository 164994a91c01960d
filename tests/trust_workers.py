"""What the robustness tests run in processes of their own, which import neither jax nor torch. No test of its own."""

import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import interop
from interop import Adapter, CheckpointError


def save_for_ever(adapters: Mapping[str, Adapter], directory: Path, layout: str, saves: int | None = None) -> None:
    """Saves one adapter after the other (for ever if `saves` is None); the file saves_go_on says that it has begun."""
    turn = itertools.cycle(adapters.values())
    for n in itertools.count() if saves is None else range(saves):
        interop.write(next(turn), directory, layout)
        if n == 1:
            (directory / "saves_go_on").touch()


def save_as_another_user(adapter: Adapter, directory: Path) -> str:
    """What a user without rights on the directory is told."""
    with tempfile.TemporaryDirectory() as folder:  # imports all that it needs, from where this user may not read
        interop.write(adapter, Path(folder, "out"))
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        interop.write(adapter, directory)
    except CheckpointError as error:
        return str(error)
    return "saved"


def read_for_a_while(adapters: Mapping[str, Adapter], directory: Path, reads: int) -> dict[str, int]:
    """How often each adapter was read, "refused", or another thing."""
    known = {_bits(adapter): name for name, adapter in adapters.items()}
    seen: Counter[str] = Counter()
    for _ in range(reads):
        try:
            seen[known.get(_bits(interop.read(directory)), "a mixture")] += 1
        except CheckpointError as error:
            seen["refused" if "going on" in str(error) else f"refused as {error}"] += 1
        except Exception as error:
            seen[f"{type(error).__name__}: {error}"] += 1
    return dict(seen)


def _bits(adapter: Adapter) -> tuple[str, ...]:
    return (repr(adapter.config), *(f"{slot}{t.tobytes()!r}" for slot, t in sorted(adapter.tensors.items())))


def rss() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
