"""`moe-lora export`: a mixture for programs that know only ordinary LoRA, or only whole models."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from moe_lora_interop.checkpoint import read_write as checkpoint
from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.cli.convert import Layout, Options, Source, Target, parse_options
from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.disk.atomic import append_text
from moe_lora_interop.errors import ConfigError
from moe_lora_interop.export.experts import export_lora_experts
from moe_lora_interop.export.fixed_gates import export_lora
from moe_lora_interop.export.gate_sources import Gates, gates_from_file, gates_of, uniform_gates
from moe_lora_interop.export.mixtral import export_mixtral
from moe_lora_interop.export.task_gates import task_gates
from moe_lora_interop.progress_bar import Bar
from moe_lora_jax.measure.export_report import export_report, mean_gates

_BELONGS = {"gates": ("lora",), "task": ("lora",), "dtype": ("mixtral",), "data": ("lora", "lora-experts")}


def export(
    source: Source,
    target: Target,
    *,
    form: Annotated[Literal["lora-experts", "lora", "mixtral"], tyro.conf.arg(name="as")],
    gates: str | None = None,
    task: tuple[int, ...] = (),
    base: Path | None = None,
    data: Path | None = None,
    max_length: int = 512,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    dialect: Layout = None,
    options: Options = (),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a mixture for stock PEFT (lora-experts, lora), or as a standalone Mixtral model.

    Args:
        source: The adapter's directory, in any layout.
        target: A new or empty directory.
        form: lora-experts: one ordinary LoRA directory per expert. lora: one ordinary LoRA with fixed gates (--gates or
            --task). mixtral: a whole model that keeps the router, from a feed-forward mixture on a Llama or Mistral.
        gates: For lora: uniform, mean (the averages on --data, needs --base), or a JSON file: a list of gates, or
            {module: list}.
        task: For lora: the gates of this task id, or of the mean of several (adapters that route by task).
        base: The base model's directory.
        data: JSONL on which to measure mean gates and, for lora and lora-experts, what the export costs.
        max_length: Tokens of an example that are used.
        dtype: For mixtral: dtype of the model; the base's own if not given.
        dialect: The layout of the source; detected if not given.
        options: What the source's layout does not record; VALUE is JSON or plain text. Repeatable.
    """
    given = {"gates": gates, "task": task or None, "dtype": dtype, "data": data}
    problems = [
        f"{name}: found with --as {form}, expected only with {' or '.join(_BELONGS[name])}"
        for name, value in given.items()
        if value is not None and form not in _BELONGS[name]
    ]
    if form == "lora" and (gates is None) == (not task):
        problems.append("gates, task: expected one of --gates uniform, --gates mean, --gates FILE.json and --task ID")
    if base is None and (form == "mixtral" or data is not None):
        problems.append("base: missing, expected the base model's directory")
    if gates == "mean" and data is None:
        problems.append("data: missing, expected a JSONL file on which --gates mean measures")
    if problems:
        raise ConfigError("invalid arguments", problems)

    shell = Shell(quiet=quiet, json=json)
    report = None
    with shell.progress("reading the adapter") as bar:
        adapter = checkpoint.read(source, dialect, **parse_options(options))
        if form == "mixtral":
            assert base is not None
            bar.stage("writing the model's tensors")
            notes = export_mixtral(adapter, base, target, dtype=dtype, on_progress=bar)
        elif form == "lora":
            measured = {"base": base, "data": data, "max_length": max_length}
            fixed = _gates(adapter, gates, task, measured, bar)
            bar.stage("joining the experts of each module")
            notes = export_lora(adapter, target, *fixed, on_progress=bar)
        else:
            bar.stage("writing the experts")
            notes = export_lora_experts(adapter, target, on_progress=bar)
        if data is not None:
            assert base is not None
            bar.stage("measuring what it costs")
            report = export_report(adapter, target, base, data, max_length=max_length, task=task, on_progress=bar)
            append_text(target / "README.md", f"\n## Measured\n\n```\n{report}\n```\n")
    shell.say(f"{target}: exported as {form}")
    for line in (*(f"  - {note}" for note in notes), *str(report or "").splitlines()):
        shell.say(line)
    shell.give({"target": target, "as": form, "notes": notes, "measured": report and report.to_dict()})


def _gates(
    adapter: Adapter, gates: str | None, task: tuple[int, ...], measured: dict[str, Any], bar: Bar
) -> tuple[Gates, str]:
    """The gates, and what they are for people."""
    if task:
        return task_gates(adapter, task), f"task {', '.join(map(str, task))}"
    assert gates is not None
    if gates == "uniform":
        return uniform_gates(adapter), "uniform"
    if gates == "mean":
        if adapter.config.router_input == "task":
            raise ConfigError("no mean gates", ["gates: this adapter routes by task, expected --task ID"])
        if adapter.config.scope == "ffn":
            problem = "gates: found mean in scope ffn, where only one expert alone is a LoRA; expected a FILE.json"
            raise ConfigError("no mean gates", [problem])
        bar.stage("measuring the mean gates")
        means = mean_gates(adapter, **measured, on_progress=bar)
        return gates_of(adapter, means), f"means on {measured['data']}"
    return gates_from_file(adapter, gates), f"from {gates}"
