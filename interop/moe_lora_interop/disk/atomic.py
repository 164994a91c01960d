"""Replacing the files of a checkpoint as one: what a reader finds is the old set or the new one, or says it is neither.

The order, each step synced before the next:

1. in a scratch folder `.saving-*` inside the directory: the new files, and hard links to the old ones;
2. the links appear as `.previous` by one rename;
3. the new files are renamed into place, and files that the new set does not have are removed;
4. `.previous` disappears by one rename into the scratch folder, which is deleted.

A crash before step 3 leaves the old checkpoint, one after it the new; in step 3 the directory holds a mixture, which
the digest tells (or, in layouts without one, `.previous` itself), and the old checkpoint is complete in `.previous`.
The next save removes the leftovers of a crash, and takes back one that crashed in step 3 before it begins.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from moe_lora_interop.errors import CheckpointError

PREVIOUS = ".previous"
_NEW = ".new"  # in PREVIOUS: the names of the files that replace these
_SCRATCH = ".saving-"


def replace_files(
    directory: Path, writers: Mapping[str, Callable[[Path], None]], *, stale: Collection[str] = ()
) -> None:
    """Writes several files as one. Two saves into one directory wait for each other.

    Args:
        directory: created if missing.
        writers: {relative file name: function that writes it at the path given}.
        stale: names that must not remain if `writers` does not write them.

    Raises:
        CheckpointError: the disk refuses; the old files are in place, and nothing of the new ones. Where the disk
            refuses this too, the error says that the old ones are in PREVIOUS.
    """
    blocked = [directory / name for name in writers if (directory / name).is_dir()]
    if blocked:
        raise CheckpointError("could not save", [f"{path}: found a directory, expected a file" for path in blocked])
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in created:
            _sync(path.parent)
        with _locked(directory):
            _replace(directory, writers, stale)
    except BaseException as error:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()  # only if nothing is in it
        if not isinstance(error, OSError | SafetensorError | UnicodeError):
            raise  # not of this disk: interrupted, or a writer could not read its source
        problems = [f"{directory}: {error}"]
        if is_being_replaced(directory):
            problems.append(f"what was there before is complete in {directory / PREVIOUS}; the next save puts it back")
        raise CheckpointError("could not save", problems) from error


def replace_file(path: Path, content: bytes) -> None:
    """Writes one file, which is at every moment the old one or the new one."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    _sync(new)
    os.replace(new, path)
    _sync(path.parent)


def is_being_replaced(directory: Path) -> bool:
    """Whether a save is going on in `directory`, or one was interrupted and the old checkpoint is in PREVIOUS."""
    return (directory / PREVIOUS).is_dir()


def will_remain(directory: Path, name: str) -> bool:
    """Whether there is a file `name` that the next save finds: not one of an interrupted save, which it takes back."""
    return (directory / name).exists() and name not in _new_names(directory / PREVIOUS)


def _replace(directory: Path, writers: Mapping[str, Callable[[Path], None]], stale: Collection[str]) -> None:
    for leftover in directory.glob(f"{_SCRATCH}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=directory))
    try:
        taken_back = _take_back(directory, scratch) if is_being_replaced(directory) else []
        for name, write in writers.items():
            write(_place(scratch / "new", name))
        for name in dict.fromkeys([*writers, *stale, *taken_back]):
            if (directory / name).is_file():
                _link(directory / name, _place(scratch / "old", name))
        _place(scratch / "old", _NEW).write_text("\n".join(writers), "utf-8")
        _sync_all(scratch)
        try:
            os.rename(scratch / "old", directory / PREVIOUS)
            _sync(directory)
            for name in writers:
                os.replace(scratch / "new" / name, _place(directory, name))
            for name in _files(directory / PREVIOUS):
                if name not in writers:
                    _remove(directory, name)
            _sync_folders(directory, writers)
            os.rename(directory / PREVIOUS, scratch / "replaced")
        except BaseException:
            if is_being_replaced(directory):
                with contextlib.suppress(OSError):  # PREVIOUS stays, and the next save tries again
                    _take_back(directory, scratch)
            raise
        with contextlib.suppress(OSError):  # all that may come back after a power cut is PREVIOUS
            _sync(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _take_back(directory: Path, scratch: Path) -> list[str]:
    """Removes what an unfinished save has written, and puts the old files in place: their names are returned.

    PREVIOUS stays complete until then.
    """
    previous = directory / PREVIOUS
    old = _files(previous)
    for name in _new_names(previous):
        if name not in old:
            _remove(directory, name)
    for name in old:
        _link(previous / name, scratch / "back")
        os.replace(scratch / "back", _place(directory, name))
        (scratch / "back").unlink(missing_ok=True)  # a rename onto a link to the same file does nothing
    _sync_folders(directory, old)
    os.rename(previous, scratch / "taken_back")
    _sync(directory)
    return old


def _new_names(previous: Path) -> list[str]:
    listed = previous / _NEW
    return listed.read_text("utf-8").splitlines() if listed.exists() else []


def _files(previous: Path) -> list[str]:
    found = (str(path.relative_to(previous)) for path in previous.rglob("*") if path.is_file())
    return sorted(name for name in found if name != _NEW)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # gives up the lock


def _place(directory: Path, name: str) -> Path:
    """The path of `name`, with its parents made."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)  # resolved: a relative symlink means something else elsewhere
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
        _sync(target)


def _remove(directory: Path, name: str) -> None:
    """Removes a file, and the folders in `directory` that it leaves empty."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        (directory / name).unlink()
    for parent in list(Path(name).parents)[:-1]:
        folder = directory / parent
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _sync_folders(directory: Path, names: Iterable[str]) -> None:
    for folder in dict.fromkeys([*((directory / name).parent for name in names), directory]):
        _sync(folder)


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""

    def write_it(target: Path) -> None:
        target.write_text(text, "utf-8")

    replace_files(path.parent, {path.name: write_it})


def append_text(path: Path, text: str) -> None:
    """Adds to a text file."""
    write_text(path, path.read_text("utf-8") + text)


def require_empty(directory: str | os.PathLike[str]) -> Path:
    """The path, if nothing is there or an empty directory.

    Raises:
        CheckpointError: something is there, which would be mixed with what is written.
    """
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        found = "a directory that is not empty" if path.is_dir() else "a file"
        raise CheckpointError("the target is in use", [f"{path}: found {found}, expected nothing there"])
    return path
