"""Replacing the files of a checkpoint as one: what a reader finds is the old set or the new one, or says it is neither.

The order, each step synced before the next:

1. the new files are written to a scratch folder `.saving-*` inside the directory;
2. hard links to the old ones are collected in `.previous`, which appears by one rename;
3. the new files are renamed into place, and files that the new set does not have are removed;
4. `.previous` disappears by one rename, and is deleted.

A crash before step 3 leaves the old checkpoint, one after it the new; in step 3 the directory holds a mixture, which
the digest tells (or, in layouts without one, `.previous` itself), and the old checkpoint is complete in `.previous`.
The next save removes the leftovers of a crash, and takes back one that crashed in step 3 before it begins.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from interop.errors import CheckpointError

PREVIOUS = ".previous"
_SCRATCH, _DISCARDED = ".saving-", ".discarded-"


def replace_files(
    directory: Path, writers: Mapping[str, Callable[[Path], None]], *, stale: Collection[str] = ()
) -> None:
    """Writes several files as one.

    Args:
        directory: created if missing.
        writers: {relative file name: function that writes it at the path given}.
        stale: names that must not remain if `writers` does not write them.

    Raises:
        CheckpointError: the disk refuses; the old files are in place, and nothing of the new ones.
    """
    existed = directory.exists()
    blocked = [directory / name for name in writers if (directory / name).is_dir()]
    if blocked:
        raise CheckpointError("could not save", [f"{path}: found a directory, expected a file" for path in blocked])
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _recover(directory, {*writers, *stale})
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=directory) as scratch:
            for name, write in writers.items():
                new = Path(scratch, name)
                new.parent.mkdir(parents=True, exist_ok=True)
                write(new)
                _sync(new)
            old = [n for n in {**dict.fromkeys(writers), **dict.fromkeys(stale)} if (directory / n).is_file()]
            _keep(directory, old)
            with _restoring(directory, list(writers), old):
                for name in writers:
                    (directory / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(Path(scratch, name), directory / name)
                for name in set(old) - writers.keys():
                    (directory / name).unlink()
                _sync(directory)
        _discard(directory / PREVIOUS)
    except (OSError, SafetensorError, UnicodeError) as error:
        if not existed:
            with contextlib.suppress(OSError):
                directory.rmdir()  # only if nothing is in it
        raise CheckpointError("could not save", [f"{directory}: {error}"]) from error


def is_being_replaced(directory: Path) -> bool:
    """Whether a save is going on in `directory`, or one was interrupted and the old checkpoint is in PREVIOUS."""
    return (directory / PREVIOUS).is_dir()


def _keep(directory: Path, names: Collection[str]) -> None:
    """Collects links to the old files in PREVIOUS, which appears complete or not at all."""
    if not names:
        return
    folder = Path(tempfile.mkdtemp(prefix=_DISCARDED, dir=directory))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(directory / name, folder / name)
        except OSError:  # a file system without hard links
            shutil.copy2(directory / name, folder / name)
            _sync(folder / name)
    _sync(folder)
    os.rename(folder, directory / PREVIOUS)
    _sync(directory)


@contextlib.contextmanager
def _restoring(directory: Path, written: Collection[str], old: Collection[str]) -> Iterator[None]:
    """Puts the old files back if a rename fails."""
    try:
        yield
    except OSError:
        _put_back(directory, old)
        for name in set(written) - set(old):
            (directory / name).unlink(missing_ok=True)
        _discard(directory / PREVIOUS)
        raise


def _discard(folder: Path) -> None:
    """Removes a folder; its name is gone at once, so that half of it is never taken for the whole."""
    if folder.is_dir():
        gone = Path(tempfile.mkdtemp(prefix=_DISCARDED, dir=folder.parent))
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _recover(directory: Path, stale: Collection[str]) -> None:
    """Removes what crashed saves left; one that crashed among its renames is taken back."""
    for leftover in directory.iterdir():
        if leftover.name.startswith((_SCRATCH, _DISCARDED)) and leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
    previous = directory / PREVIOUS
    if previous.is_dir():
        old = [str(path.relative_to(previous)) for path in previous.rglob("*") if path.is_file()]
        for name in set(stale) - set(old):
            (directory / name).unlink(missing_ok=True)
        _put_back(directory, old)
        _discard(previous)


def _put_back(directory: Path, names: Collection[str]) -> None:
    """Copies files from PREVIOUS into place; PREVIOUS stays complete until all are there."""
    for name in names:
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=directory) as scratch:
            shutil.copy2(directory / PREVIOUS / name, Path(scratch, "file"))
            _sync(Path(scratch, "file"))
            os.replace(Path(scratch, "file"), directory / name)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
