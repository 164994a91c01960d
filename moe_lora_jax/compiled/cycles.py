"""What a TPU program costs, by its own compiler: the cycles that it estimates, summed over all that runs."""

import re
from dataclasses import dataclass

from moe_lora_jax.compiled.hlo import Instruction, Program, read_hlo

_PALLAS = "tpu_custom_call"


@dataclass(frozen=True)
class Cost:
    """Cycles of one instruction in all its `runs`, and the operation and the line of Python that it comes from."""

    name: str
    cycles: int
    runs: int
    op_name: str
    source: str


@dataclass(frozen=True)
class Cycles:
    """The compiler's estimate for one run of a program on one chip.

    total: cycles of all instructions. Waiting for other chips is not in it.
    costs: of the instructions that have any, the dearest first.
    kernels: Pallas kernels, of which the compiler knows no cycles: {name: runs}. They are not in the total.
    """

    total: int
    costs: tuple[Cost, ...]
    kernels: dict[str, int]


def estimated_cycles(text: str) -> Cycles:
    """The sum of `estimated_cycles` over a program compiled for TPU; a loop's body counts as often as it runs.

    The trips of a loop are those that the compiler knows, or else the largest number that its condition compares with.
    Of a conditional the dearest branch counts. (`cost_analysis()` has no such number: its flops count a loop's body
    once, its optimal_seconds is negative.)

    Args:
        text: `compiled.as_text()`.

    Raises:
        ValueError: not the text of a compiled program.
    """
    program = read_hlo(text)
    costs, kernels = _of(program, program.entry, 1)
    ordered = sorted(costs, key=lambda cost: -cost.cycles)
    return Cycles(sum(cost.cycles for cost in costs), tuple(ordered), kernels)


def _of(program: Program, computation: str, runs: int) -> tuple[list[Cost], dict[str, int]]:
    costs: list[Cost] = []
    kernels: dict[str, int] = {}
    for instruction in program.computations.get(computation, []):
        called = [_of(program, name, runs * trips) for name, trips in _called(program, instruction)]
        if called:
            inside = max(called, key=lambda found: sum(cost.cycles for cost in found[0]))
            costs += inside[0]
            kernels |= inside[1]
        if f'custom_call_target="{_PALLAS}"' in instruction.text:
            kernels[instruction.name] = runs
        elif found := re.search(r'"estimated_cycles":"(\d+)"', instruction.text):
            source = program.source(instruction)
            costs.append(Cost(instruction.name, int(found[1]) * runs, runs, instruction.op_name, source))
    return costs, kernels


def _called(program: Program, instruction: Instruction) -> list[tuple[str, int]]:
    """[(computation that runs, how often)]; several are alternatives. (A fusion's cycles stand in its own line.)"""
    if instruction.opcode == "while":
        body = instruction.computation("body")
        return [(body, _trips(program, instruction))] if body else []
    if instruction.opcode == "call":
        callee = instruction.computation("to_apply")
        return [(callee, 1)] if callee else []
    if instruction.opcode == "conditional":
        several = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
        names = (
            several[1].split(",") if several else re.findall(r"(?:true|false)_computation=(\S+?),", instruction.text)
        )
        return [(name.strip().lstrip("%"), 1) for name in names]
    return []


def _trips(program: Program, loop: Instruction) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known[1])
    todo, bounds = [loop.computation("condition")], list[int]()
    while todo:
        for instruction in program.computations.get(todo.pop() or "", []):
            bounds += map(int, re.findall(r"^[su]32\[\]\S* constant\((\d+)\)", instruction.text))
            todo.append(instruction.computation("calls"))
    return max(bounds, default=1) or 1
