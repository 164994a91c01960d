"""`moe-lora measure`: what exports ask of data: average gates before, and the cost after."""

import json as json_text
from pathlib import Path
from typing import Annotated

import tyro

from moe_lora_interop.checkpoint import read_write as checkpoint
from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.cli.convert import Layout, Options, Source, parse_options
from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.disk.atomic import append_text, write_text
from moe_lora_interop.errors import ConfigError, printable
from moe_lora_interop.export.task_gates import task_gates
from moe_lora_jax.measure.export_report import export_report, mean_gates


def measure(
    source: Source,
    *,
    base: Path,
    data: Path,
    means: Annotated[Path | None, tyro.conf.arg(name="mean-gates", metavar="FILE.json")] = None,
    exported: Path | None = None,
    task: tuple[int, ...] = (),
    max_length: int = 512,
    layout: Layout = None,
    options: Options = (),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a mixture on data: its mean gates for `export --gates`, or what an export costs.

    Args:
        source: The adapter's directory, in any layout.
        base: The base model's directory.
        data: JSONL, as for training.
        means: A new file for the gates of every router, averaged over all tokens: `moe-lora export --gates FILE.json`.
        exported: What `moe-lora export` wrote as lora or lora-experts: compare its next tokens, and those of the base
            alone, with the mixture's. The table also goes into its README.md.
        task: With --exported: the task id that the mixture gets, or several to average (adapters that route by task).
        max_length: Tokens of an example that are used.
        layout: The layout of the source; detected if not given.
        options: What the source's layout does not record; VALUE is JSON or plain text. Repeatable.
    """
    problems = []
    if means is None and exported is None:
        problems.append("mean_gates, exported: expected --mean-gates FILE.json, --exported DIR or both")
    if means is not None and means.exists():
        problems.append(f"mean_gates: found {means}, expected nothing there")
    if exported is not None and not (exported / "README.md").is_file():
        problems.append(f"exported: found no {exported}/README.md, expected a directory that `moe-lora export` wrote")
    if task and exported is None:
        problems.append("task: found without --exported, expected only with it")
    if problems:
        raise ConfigError("invalid arguments", problems)

    shell = Shell(quiet=quiet, json=json)
    report = None
    with shell.progress("reading the adapter") as bar:
        adapter = checkpoint.read(source, layout, **parse_options(options))
        if means is not None:
            _require_means(adapter)
        if exported is not None and (task or adapter.config.router_input == "task"):
            task_gates(adapter, task)  # for its errors: the model's own would come late
        if means is not None:
            bar.stage("measuring the mean gates")
            gates = mean_gates(adapter, base, data, max_length=max_length, on_progress=bar)
            write_text(means, json_text.dumps(gates, indent=2) + "\n")
        if exported is not None:
            bar.stage("measuring what it costs")
            report = export_report(adapter, exported, base, data, max_length=max_length, task=task, on_progress=bar)
            append_text(exported / "README.md", f"\n## Measured\n\n```\n{report}\n```\n")
    if means is not None:
        shell.say(f"{means}: mean gates on {data}")
    if report is not None and not json:
        print("\n".join(printable(line) for line in str(report).splitlines()))
    shell.give({"source": source, "mean_gates": means, "exported": exported, "measured": report and report.to_dict()})


def _require_means(adapter: Adapter) -> None:
    problems = []
    if adapter.config.router_input == "task":
        problems.append("gates: this adapter routes by task, expected --task ID of `moe-lora export`")
    if adapter.config.scope == "ffn":
        problems.append(
            "gates: found mean in scope ffn, where only one expert alone is a LoRA; expected a FILE.json that names it"
        )
    if problems:
        raise ConfigError("no mean gates", problems)
