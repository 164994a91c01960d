"""The shell verbs that need neither jax nor torch: `inspect` and `verify`. Each prints, and returns an exit code."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from moe_lora_interop.checkpoint import inspection as checks
from moe_lora_interop.checkpoint.servable import VllmNeeds
from moe_lora_interop.cli.convert import Layout, Options, parse_options
from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.dialects.registry import dialect_named
from moe_lora_interop.disk.files import existing_directory
from moe_lora_interop.disk.hub import adapter_directory
from moe_lora_interop.errors import printable


def inspect(
    directory: Annotated[Path, tyro.conf.Positional],
    *,
    layout: Layout = None,
    options: Options = (),
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Describe a checkpoint in any layout: tensors, sizes, routing, what vLLM needs. Reads headers only.

    Args:
        directory: The adapter's directory.
        layout: The layout; detected if not given.
        options: What the layout does not record; VALUE is JSON or plain text. Repeatable.
    """
    shell = Shell(quiet=quiet, json=json)
    with shell.progress("reading"):
        found = checks.inspect(directory, layout, **parse_options(options))
    shell.give(found.to_dict())
    if json:
        return 0
    rows = [(printable(name), info) for name, info in sorted(found.tensors.items())]
    width = max((len(name) for name, _ in rows), default=0)
    for name, info in rows:  # not a table of rich, which takes seconds for thousands of tensors
        print(f"  {name:<{width}}  {info.dtype:<4}  {list(info.shape)}")
    print()
    console = Console()
    config = found.config
    version = dialect_named(found.layout).header(config.to_dict()).get("format_version")
    for name, value in (
        ("layout", found.layout + (f", format version {version}" if version else "")),
        ("base model", config.base_model_name_or_path or "not recorded"),
        ("experts", f"{config.num_experts} of rank {config.r}, lora_alpha {config.lora_alpha}"),
        ("routing", found.routing),
        ("size", f"{found.parameters:,} parameters, {found.bytes:,} bytes"),
        *(("vLLM", text) for text in _in_vllm(found.vllm)),
    ):
        console.print(Text.assemble((f"{name:>10}", "bold"), f"  {printable(str(value))}"), highlight=False)
    for note in found.notes:
        console.print(Text.assemble((f"{'note':>10}", "bold"), f"  {printable(note)}"), highlight=False)
    return 0


def _in_vllm(needs: VllmNeeds) -> list[str]:
    """How vLLM serves it, or each reason why it does not."""
    if needs.max_lora_rank is None:
        return [f"cannot serve it: {problem}" for problem in needs.problems]
    with_plugin = ", with the plugin of moe-lora-jax[vllm]" if needs.plugin else ""
    return [f"--enable-lora --max-lora-rank {needs.max_lora_rank}{with_plugin}"]


def verify(
    directory: Annotated[Path, tyro.conf.Positional],
    *,
    base: Path | None = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Check a checkpoint completely. Exit code 0: sound, 1: not.

    Args:
        directory: The adapter's directory.
        base: A Hugging Face model directory that the adapter must fit.
    """
    shell = Shell(quiet=quiet, json=json)
    with shell.progress("checking"):
        for path in (adapter_directory(directory), *([] if base is None else [base])):
            existing_directory(path)
        findings = checks.verify(directory, base)
    sound = all(f.level != "error" for f in findings)
    shell.give({"sound": sound, "findings": [f.__dict__ for f in findings]})
    if not json:
        for finding in findings:
            print(printable(f"{finding.level}: {finding.message}"))
        print("sound" if sound else "NOT sound")
    return 0 if sound else 1
