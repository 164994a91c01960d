"""When memory runs out: an error that says during what, and what to do."""

import contextlib
from collections.abc import Iterator, Sequence

from moe_lora_interop.errors import OutOfMemoryError

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
