"""Compiling a lowered program for devices that are not there, and what its compiler then knows of it."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from moe_lora_jax.compiled.cycles import Cycles, estimated_cycles
from moe_lora_jax.compiled.hlo import read_hlo
from moe_lora_jax.compiled.memory import Memory, read_memory


@dataclass(frozen=True)
class Ahead:
    """What compiling said.

    memory: of one device.
    code: bytes of the program itself, which lies in the same memory; 0 of what does not fit.
    cycles: the TPU compiler's estimate; None where it has none (on other devices, and of what does not fit).
    refusal: the compiler's words if the program needs more memory than the device has; else None.
    """

    memory: Memory
    code: int
    cycles: Cycles | None
    refusal: str | None


def compile_ahead(lowered: jax.stages.Lowered) -> Ahead:
    """Compiles, reads, and forgets the program.

    Raises:
        jax.errors.JaxRuntimeError: it cannot be compiled, for another reason than that the memory does not suffice.
    """
    with tempfile.TemporaryDirectory() as folder, _without_cache():
        code, cycles, refusal = 0, None, None
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            stats = compiled.memory_analysis()
            code = 0 if stats is None else stats.generated_code_size_in_bytes
            text = compiled.as_text() or ""
            cycles = estimated_cycles(text) if '"estimated_cycles"' in text else None
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = str(error)
        (assignment,) = Path(folder).glob("*after_optimizations-buffer-assignment.txt")
        (program,) = Path(folder).glob("*after_optimizations.txt")
        return Ahead(read_memory(assignment.read_text(), read_hlo(program.read_text())), code, cycles, refusal)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """JAX's persistent cache cannot load a program for devices that are not there, and a cached one dumps nothing."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
