"""A disk that fails, stops or loses power at a chosen step of what Python does to it. No test of its own.

Every write, fsync, link, rename, removal and mkdir under `root` is a step, seen where Python hands it to the kernel:
the functions of `os`, and the raw files below `open`.
"""

import builtins
import contextlib
import errno
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

CHANGES = ("fsync", "replace", "rename", "link", "unlink", "remove", "rmdir", "mkdir")


class Disk:
    """Calls `before(step number, what, path)` ahead of each step; what it raises is what the disk answers."""

    def __init__(self, root: Path, before: Callable[[int, str, str], None] = lambda *_: None):
        self.root, self.before, self.steps = root, before, 0
        self._busy = False
        self._data: dict[int, bytes] = {}  # inode: content at its last fsync
        self._entries: dict[int, dict[str, int]] = {}  # inode of a folder: {name: inode} at its last fsync
        for path in [root, *root.rglob("*")] if root.exists() else []:  # what was there before is safe
            self._note(path)

    @contextlib.contextmanager
    def watched(self) -> Iterator["Disk"]:
        real = {name: getattr(os, name) for name in CHANGES}
        opened = io.open
        for name in CHANGES:
            setattr(os, name, self._watch(name, real[name]))
        builtins.open = io.open = lambda *args, **kwargs: self._open(opened, *args, **kwargs)
        try:
            yield self
        finally:
            builtins.open = io.open = opened
            for name in CHANGES:
                setattr(os, name, real[name])

    def _watch(self, name, function):
        def call(*args, **kwargs):
            path = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else os.fspath(args[0])
            if self._is_inside(path, kwargs.get("dir_fd")):
                self._step(name, path)
                if name == "fsync":
                    self._note(Path(path))
            return function(*args, **kwargs)

        return call

    def _is_inside(self, path: str, dir_fd: int | None = None) -> bool:
        return not self._busy and (dir_fd is not None or Path(path).absolute().is_relative_to(self.root))

    def _step(self, what: str, path: str) -> None:
        self.steps += 1
        self._busy = True
        try:
            self.before(self.steps, what, path)
        finally:
            self._busy = False

    def _open(self, opened, file, mode="r", *args, **kwargs):
        if not set(mode) & set("wax+") or isinstance(file, int) or not self._is_inside(os.fspath(file)):
            return opened(file, mode, *args, **kwargs)
        self._step("open", os.fspath(file))
        opened(file, mode, *args, **kwargs).close()  # its own checks of the arguments
        raw = _Raw(file, "r+" if "+" in mode or mode[0] != "a" else "a", self)
        self._data.pop(os.fstat(raw.fileno()).st_ino, None)
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        names = ("buffering", "encoding", "errors", "newline")
        given = dict(zip(names, args, strict=False)) | kwargs
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *(given.get(n) for n in names[1:]))

    def _note(self, path: Path) -> None:
        inode = path.stat().st_ino
        if path.is_dir():
            self._entries[inode] = {name: (path / name).stat().st_ino for name in os.listdir(path)}
        else:
            self._data[inode] = path.read_bytes()

    # --- what a crash leaves --------------------------------------------------------------------------------------

    def after_kill(self, target: Path) -> None:
        """Copies what is there: what another process finds if this one is killed now."""
        shutil.copytree(self.root, target)

    def after_power_cut(self, target: Path, survives: float, seed: int) -> None:
        """Builds what a disk may hold if power fails now.

        Data that were not synced are lost; of the names that were not synced in their folder, each survives with
        probability `survives`.
        """
        chance = random.Random(seed)
        paths = [self.root, *self.root.rglob("*")]
        current = {p.stat().st_ino: {n: (p / n).stat().st_ino for n in os.listdir(p)} for p in paths if p.is_dir()}

        def build(inode: int, place: Path) -> None:
            if inode not in current and inode not in self._entries:
                place.write_bytes(self._data.get(inode, b""))
                return
            place.mkdir()
            safe, now = self._entries.get(inode, {}), current.get(inode, {})
            for name in sorted(safe.keys() | now.keys()):
                found = (safe if safe.get(name) == now.get(name) or chance.random() >= survives else now).get(name)
                if found is not None:
                    build(found, place / name)

        build(self.root.stat().st_ino, target)


class _Raw(io.FileIO):
    """A file whose every write is a step, taken when half of it is written."""

    def __init__(self, file, mode: str, disk: Disk):
        super().__init__(file, mode)
        self._disk = disk

    def write(self, data) -> int:
        if self._disk._busy:
            return super().write(data)
        half = super().write(memoryview(data)[: len(data) // 2])
        self._disk._step("write", os.fspath(self.name))
        return half + super().write(memoryview(data)[half:])


def refuses(code: int, at: int, *, for_good: bool = False) -> Callable[[int, str, str], None]:
    """Step `at`, or also every one after it, is answered with the error `code`."""

    def before(step: int, what: str, path: str) -> None:
        if step == at or (for_good and step > at):
            raise OSError(code, os.strerror(code), path)

    return before


ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
