"""The shell verbs that need neither jax nor torch: `inspect` and `verify`. Each prints, and returns an exit code."""

import json
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from interop import checks


def inspect(
    directory: Annotated[Path, tyro.conf.Positional],
    *,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Describe a checkpoint: layout, routing rule, tensors. Reads headers only.

    Args:
        directory: The adapter's directory.
        json_output: Print JSON instead of a table.
    """
    found = checks.inspect(directory)
    if json_output:
        print(json.dumps(found.to_dict(), indent=2, sort_keys=True))
        return 0
    console = Console()
    config = found.config
    for name, value in (
        ("layout", f"{found.dialect}, format version {config.format_version}"),
        ("base model", config.base_model_name_or_path or "not recorded"),
        ("experts", f"{config.num_experts} of rank {config.r}, lora_alpha {config.lora_alpha}"),
        ("routing", found.routing),
        ("size", f"{found.parameters:,} parameters, {found.bytes:,} bytes"),
    ):
        console.print(f"[bold]{name:>10}[/]  {escape(str(value))}", highlight=False)
    table = Table("tensor", "dtype", "shape")
    for name, info in sorted(found.tensors.items()):
        table.add_row(escape(name), info.dtype, str(list(info.shape)).replace("[", r"\["))
    console.print(table)
    return 0


def verify(
    directory: Annotated[Path, tyro.conf.Positional],
    *,
    base: Path | None = None,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Check a checkpoint completely. Exit code 0: sound, 1: not.

    Args:
        directory: The adapter's directory.
        base: A Hugging Face model directory that the adapter must fit.
        json_output: Print JSON instead of text.
    """
    findings = checks.verify(directory, base)
    sound = all(f.level != "error" for f in findings)
    if json_output:
        print(json.dumps({"sound": sound, "findings": [f.__dict__ for f in findings]}, indent=2))
    else:
        for finding in findings:
            print(f"{finding.level}: {finding.message}")
        print("sound" if sound else "NOT sound")
    return 0 if sound else 1
