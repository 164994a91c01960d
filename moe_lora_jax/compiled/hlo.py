"""The text of a compiled program (HLO), read as far as its costs and its memory need."""

import re
from dataclasses import dataclass, field
from pathlib import PurePath

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*")
_INSTRUCTION = re.compile(r"  (?:ROOT )?%?([\w.\-]+) = (.*)")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_ENTRY_OF_TABLE = re.compile(
    r'(\d+) (?:"(.*)"|\{file_(?:name|location)_id=(\d+).*?(?: (?:line|parent_frame_id)=(\d+).*)?\})'
)
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: `%name = shape opcode(operands), attributes`."""

    name: str
    text: str

    @property
    def opcode(self) -> str:
        found = _OPCODE.search(self.text)
        return found[1] if found else ""

    @property
    def shape(self) -> str:
        """Of the result; with its layout, which says in which memory it lies."""
        found = _OPCODE.search(self.text)
        return self.text[: found.start()] if found else ""

    @property
    def op_name(self) -> str:
        """The JAX operation that it comes from, with all that was being traced; "" for one that the compiler made."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.text)
        return found[1] if found else ""

    def computation(self, attribute: str) -> str | None:
        """The name of the computation that an attribute (body, condition, calls, to_apply) names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return found[1] if found else None


@dataclass(frozen=True)
class Program:
    """computations: {name: instructions}; entry: the name of the first one to run."""

    computations: dict[str, list[Instruction]]
    entry: str
    _places: dict[str, str] = field(repr=False)

    def source(self, instruction: Instruction) -> str:
        """ "file.py:line" of the Python code that made it; "" for an instruction that the compiler made."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.text)
        return self._places.get(found[1], "") if found else ""


def read_hlo(text: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
        ValueError: not the text of a compiled program.
    """
    computations: dict[str, list[Instruction]] = {}
    tables: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in _TABLES}
    current, table, entry = None, None, None
    for line in text.splitlines():
        if line in tables:
            table = tables[line]
        elif table is not None and (row := _ENTRY_OF_TABLE.fullmatch(line)):
            table[row[1]] = (row[2] or row[3], row[4] or "")
        elif found := _INSTRUCTION.match(line):
            if current is not None:
                current.append(Instruction(found[1], found[2]))
        elif found := None if line.startswith(" ") else _COMPUTATION.fullmatch(line):
            current = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif current and line.strip() not in ("", "}"):  # a long instruction goes on
            current[-1] = Instruction(current[-1].name, f"{current[-1].text} {line.strip()}")
    if entry is None:
        raise ValueError("found no ENTRY computation, expected the text of a compiled program")
    return Program(computations, entry, _places(tables))


def _places(tables: dict[str, dict[str, tuple[str, str]]]) -> dict[str, str]:
    """{stack frame: "file.py:line"} of its innermost call that is not flax's own."""
    frames = tables["StackFrames"]

    def place(frame: str) -> str:
        location, parent = frames[frame]
        file, line = tables["FileLocations"].get(location, ("", ""))
        name, _ = tables["FileNames"].get(file, ("", ""))
        outer = str(int(parent or 1) - 1)  # counted from 1, where 1 is none
        if "/flax/" in name and outer in frames and int(outer) < int(frame):
            return place(outer)
        return f"{'/'.join(PurePath(name).parts[-3:])}:{line}" if name else ""

    return {frame: place(frame) for frame in frames}
