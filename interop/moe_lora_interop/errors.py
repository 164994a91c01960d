"""The errors that this library raises: each lists every problem found, or everything to do, not only the first."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence


class _ProblemList(Exception):
    """An error with a headline and one line per problem; printing it is safe, whatever names a file has."""

    def __init__(self, what: str, problems: Sequence[str] = ()):
        self.what = what
        self.problems = tuple(problems)
        lines = [f"{what}:", *self.problems] if self.problems else [what]
        super().__init__("\n  - ".join(map(printable, lines)))

    def __reduce__(self):
        return type(self), (self.what, self.problems)


class CheckpointError(_ProblemList):
    """A checkpoint cannot be read, written or applied. `.problems` has one entry per tensor, file or field."""


class ConfigError(_ProblemList, ValueError):
    """A configuration is invalid. `.problems` has one entry per wrong field."""


class OutOfMemoryError(_ProblemList, MemoryError):
    """The work does not fit into memory. `.problems` says what could not be had, then what makes the work smaller."""


LONGEST = 2000


def printable(text: str) -> str:
    r"""The text, cut if long, with every character that is not printable as an escape: \n, \x1b."""
    if len(text) > LONGEST:
        return f"{printable(text[:LONGEST])} ... ({len(text)} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def expected(name: str, known: Iterable[str]) -> str:
    """ "expected one of a, b, c", and the one that was probably meant."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"expected one of {', '.join(names)}" + (f"; did you mean {near[0]}?" if near else "")


NEXT_STEPS = (
    "use a machine with more memory, or end what else runs on this one",
    "a base model is read in its stored dtype; bfloat16 takes half of float32 (--dtype, where the verb has it)",
    "an adapter_model.bin is read as a whole, a .safetensors tensor by tensor",
)
"""Where nothing more is known of what was going on."""


WORDS = ("RESOURCE_EXHAUSTED", "Out of memory", "OUT_OF_MEMORY", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Of Python and numpy (MemoryError), JAX (no type of its own, and a dispatch hides the status RESOURCE_EXHAUSTED
    behind INTERNAL, so by its words) or torch (OutOfMemoryError; on the CPU only its allocator's words)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def explanation(error: BaseException, doing: str, next_steps: Sequence[str]) -> OutOfMemoryError:
    """The error for people: what was going on, what could not be had, what to do."""
    if isinstance(error, OutOfMemoryError):
        return error
    (found, *_) = str(error).rpartition("Error dispatching computation: ")[2].splitlines() or [type(error).__name__]
    return OutOfMemoryError(f"out of memory while {doing}", [f"found: {found[:300]}", *next_steps])


@contextlib.contextmanager
def explained(doing: str, next_steps: Sequence[str]) -> Iterator[None]:
    """Errors about memory leave this as an `OutOfMemoryError` that names what was done; others as they are."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
            raise
        raise explanation(error, doing, next_steps) from error
