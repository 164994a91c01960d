"""Which layout converts into which: `python -m tools.conversion_matrix` tries every pair and prints a markdown table.

For every pair A, B: an adapter in layout A -> native -> A, and A -> native -> B -> native. Every step goes through
files, and counts only if all tensors come back bit for bit. Where B cannot express a config field, the conversion is
tried again with that loss allowed.
"""

import argparse
import dataclasses
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import moe_lora_interop.export.plain_lora  # noqa: F401  registers the layout "lora"
from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.checkpoint.detection import detect
from moe_lora_interop.checkpoint.read_write import read, write
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.dialects.registry import dialect_named, file_dialects
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_interop.rules.configs import options_of
from tools.samples import SAMPLES, sample

_FIELD = re.compile(rf"\b({'|'.join(f.name for f in dataclasses.fields(MoeLoraConfig))})\b")
_ROLE = re.compile(r"\b(lora_[AB]|router\w*|threshold\w*|task_embedding)\b")
SYMBOLS = {"exact": "=", "lossy": "~", "impossible": "."}


@dataclass(frozen=True)
class Cell:
    """How a conversion went.

    Attributes:
        status: "exact", "lossy" (tensors identical, `fields` lost) or "impossible" (because of `fields`).
        fields: config fields or tensors.
    """

    status: str
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        return SYMBOLS[self.status]


def matrix(adapters: Mapping[str, Adapter]) -> dict[tuple[str, str], Cell]:
    """{(name, layout): how that adapter converts into that layout} for all known layouts.

    Args:
        adapters: {name: adapter}; a name that is a layout's must convert into that layout exactly.
    """
    targets = [d.name for d in file_dialects()]
    return {(name, target): convert_once(a, target) for name, a in adapters.items() for target in targets}


def convert_once(adapter: Adapter, target: str) -> Cell:
    """native -> target -> native, through files.

    Raises:
        AssertionError: something came back different without an error, or was not detected: a bug in a table.
    """
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a layout that lacks something which is computed then
        native, foreign, again = (Path(scratch, name) for name in ("native", "foreign", "again"))
        write(adapter, native)
        adapter = read(native)
        lost: tuple[str, ...] = ()
        try:
            write(adapter, foreign, target)
        except ConfigError as error:
            lost = _names(error)
        except CheckpointError as error:
            return Cell("impossible", _names(error))
        try:
            if lost:
                write(adapter, foreign, target, allow_loss=lost)
            found = detect(foreign)
            options = options_of(dialect_named(target), adapter.config, adapter.modules)
            write(read(foreign, target, **options), again)
        except (ConfigError, CheckpointError) as error:
            if not lost:
                raise
            return Cell("impossible", tuple(dict.fromkeys((*lost, *_names(error)))))
        assert found == target, f"written as {target}, detected as {found}"
        same = _equal(read(again), adapter)
        if lost:
            return Cell("lossy" if same else "impossible", lost)
        assert same, f"tensors differ after {target}"
        return Cell("exact")


def _equal(found: Adapter, expected: Adapter) -> bool:
    """Whether all tensors are the same, bit for bit."""
    return found.tensors.keys() == expected.tensors.keys() and all(
        (found.tensors[slot].dtype, found.tensors[slot].shape) == (tensor.dtype, tensor.shape)
        and found.tensors[slot].tobytes() == tensor.tobytes()
        for slot, tensor in expected.tensors.items()
    )


def _names(error: CheckpointError | ConfigError) -> tuple[str, ...]:
    """The config fields that an error's problems are about, or else the roles of tensors; never empty."""
    starts = [problem.split(":")[0] for problem in error.problems]
    for pattern, texts in ((_FIELD, starts), (_ROLE, starts), (_FIELD, error.problems)):
        if names := [name for text in texts for name in pattern.findall(text)]:
            return tuple(dict.fromkeys(names))
    return (error.what,)


def table(cells: Mapping[tuple[str, str], Cell]) -> Iterator[str]:
    """Markdown lines: from down, to across."""
    rows, columns = (list(dict.fromkeys(pair[i] for pair in cells)) for i in (0, 1))
    yield f"| from \\ to | {' | '.join(columns)} |"
    yield "|---|" + ":-:|" * len(columns)
    for row in rows:
        yield f"| {row} | {' | '.join(str(cells[row, column]) for column in columns)} |"


def details(cells: Mapping[tuple[str, str], Cell]) -> Iterator[str]:
    """Markdown lines: what every inexact conversion loses, or what makes it impossible."""
    yield "| from | to | | fields |"
    yield "|---|---|---|---|"
    for (row, column), cell in cells.items():
        if cell.status != "exact":
            yield f"| {row} | {column} | {cell.status} | {', '.join(cell.fields)} |"


def main(argv: list[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m tools.conversion_matrix", description=__doc__)
    parser.add_argument("--details", action="store_true", help="also list what is lost, and what makes it impossible")
    arguments = parser.parse_args(argv)
    cells = matrix({name: sample(name) for name in SAMPLES})
    print("\n".join(table(cells)))
    print("\n`=` exact, `~` all tensors exact but config fields are lost (`--allow-loss`), `.` not possible.")
    if arguments.details:
        print()
        print("\n".join(details(cells)))


if __name__ == "__main__":
    main()
