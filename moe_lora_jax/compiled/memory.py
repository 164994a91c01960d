"""What a compiled program needs of a device's memory, from the compiler's own assignment of buffers."""

import re
from dataclasses import dataclass

from moe_lora_jax.compiled.hlo import Instruction, Program

_ALLOCATION = re.compile(r"allocation \d+: size (\d+), (.*):")
_VALUE = re.compile(r" value: <\d+ ([^\s{]+)(\{[\d, ]*\})?( \(phi\))? @\d+> \(size=(\d+),offset=\d+\): (\w+\[[\d,]*\])")


@dataclass(frozen=True)
class Buffer:
    """A value that the program keeps in memory.

    bytes: on one device.
    shape: of its part on one device, as in "bf16[2048,4096]".
    op_name: the JAX operation that made it, or the argument that it is; "" if the compiler made it up.
    source: "file.py:line" of the Python code that did.
    """

    bytes: int
    shape: str
    op_name: str
    source: str


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    arguments: what the program is given; results that take an argument's place are not counted again.
    temporaries: what it needs besides, at its peak.
    total: both, other results and constants: what the compiler compares with the device's memory.
    buffers: the largest, of those that come from one operation or are one argument. They need not be alive together.
    """

    arguments: int
    temporaries: int
    total: int
    buffers: tuple[Buffer, ...]


def read_memory(assignment: str, program: Program, *, largest: int = 5) -> Memory:
    """Reads the text that XLA dumps as "buffer-assignment"; other memories than the main one (VMEM) are left out.

    Raises:
        ValueError: no allocation is in the text.
    """
    instructions = {i.name: i for computation in program.computations.values() for i in computation}
    sizes = {"arguments": 0, "temporaries": 0, "others": 0}
    found: dict[tuple[str, str, str], Buffer] = {}
    here = False
    for line in assignment.splitlines():
        if allocation := _ALLOCATION.fullmatch(line):
            size, kind = int(allocation[1]), allocation[2]
            here = "color" not in kind and "thread-local" not in kind
            if here:
                is_argument, is_temporary = kind.startswith("parameter"), "preallocated-temp" in kind
                sizes["arguments" if is_argument else "temporaries" if is_temporary else "others"] += size
        elif here and (value := _VALUE.match(line)) and not value[3]:
            buffer = _buffer(program, instructions.get(value[1]), int(value[4]), value[5])
            found.setdefault((buffer.shape, buffer.op_name, buffer.source), buffer)
    if not any(sizes.values()):
        raise ValueError("found no allocation, expected XLA's dump of a buffer assignment")
    ordered = sorted(found.values(), key=lambda buffer: -buffer.bytes)
    total = sum(sizes.values())
    return Memory(sizes["arguments"], sizes["temporaries"], total, tuple(ordered[:largest]))


def _buffer(program: Program, maker: Instruction | None, size: int, shape: str) -> Buffer:
    if maker is None:
        return Buffer(size, shape, "", "")
    return Buffer(size, shape, maker.op_name.replace("\\'", "'"), program.source(maker))
