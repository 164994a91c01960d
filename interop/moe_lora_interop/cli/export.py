"""`moe-lora export`: a mixture for programs that know only ordinary LoRA, or only whole models."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from moe_lora_interop.checkpoint import read_write as checkpoint
from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.cli.convert import Layout, Options, Source, Target, parse_options
from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.errors import ConfigError
from moe_lora_interop.export.experts import export_lora_experts
from moe_lora_interop.export.fixed_gates import export_lora
from moe_lora_interop.export.gate_sources import Gates, gates_from_file, uniform_gates
from moe_lora_interop.export.inside import Inside
from moe_lora_interop.export.mixtral import export_mixtral
from moe_lora_interop.export.task_gates import task_gates

_BELONGS = {"gates": ("lora",), "task": ("lora",), "prefix": ("lora", "lora-experts"), "dtype": ("mixtral",)}
_NO_MEAN = (
    "gates: found mean, expected uniform or a FILE.json; "
    "`moe-lora measure SOURCE --base BASE --data DATA --mean-gates FILE.json` writes the means"
)


def export(
    source: Source,
    target: Target,
    *,
    form: Annotated[Literal["lora-experts", "lora", "mixtral"], tyro.conf.arg(name="as")],
    gates: str | None = None,
    task: tuple[int, ...] = (),
    base: Path | None = None,
    prefix: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    layout: Layout = None,
    options: Options = (),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a mixture for stock PEFT (lora-experts, lora), or as a standalone Mixtral model.

    What an ordinary LoRA costs against the mixture, `moe-lora measure` says.

    Args:
        source: The adapter's directory, in any layout.
        target: A new or empty directory.
        form: lora-experts: one ordinary LoRA directory per expert. lora: one ordinary LoRA with fixed gates (--gates or
            --task). mixtral: a whole model that keeps the router, from a feed-forward mixture on a Llama or Mistral.
        gates: For lora: uniform, or a JSON file: a list of gates, or {module: list}. `moe-lora measure` writes one.
        task: For lora: the gates of this task id, or of the mean of several (adapters that route by task).
        base: For mixtral: the base model's directory. With --prefix: that of the whole model.
        prefix: For lora and lora-experts: what stands before every module where the text model is inside a larger one,
            such as language_model. (with the dot). Each must then be a layer of --base.
        dtype: For mixtral: dtype of the model; the base's own if not given.
        layout: The layout of the source; detected if not given.
        options: What the source's layout does not record; VALUE is JSON or plain text. Repeatable.
    """
    given = {"gates": gates, "task": task or None, "prefix": prefix, "dtype": dtype}
    problems = [
        f"{name}: found with --as {form}, expected only with {' or '.join(_BELONGS[name])}"
        for name, value in given.items()
        if value is not None and form not in _BELONGS[name]
    ]
    if base is not None and form != "mixtral" and prefix is None:
        problems.append(f"base: found with --as {form}, expected only with mixtral or --prefix")
    if form == "lora" and (gates is None) == (not task):
        problems.append("gates, task: expected one of --gates uniform, --gates FILE.json and --task ID")
    if form == "lora" and gates == "mean":
        problems.append(_NO_MEAN)
    if base is None and (form == "mixtral" or prefix is not None):
        problems.append("base: missing, expected the base model's directory")
    if problems:
        raise ConfigError("invalid arguments", problems)

    inside = None if prefix is None or base is None else Inside(prefix, base)
    shell = Shell(quiet=quiet, json=json)
    with shell.progress("reading the adapter") as bar:
        adapter = checkpoint.read(source, layout, **parse_options(options))
        if form == "mixtral":
            assert base is not None
            bar.stage("writing the model's tensors")
            notes = export_mixtral(adapter, base, target, dtype=dtype, on_progress=bar)
        elif form == "lora":
            fixed = _gates(adapter, gates, task)
            bar.stage("joining the experts of each module")
            notes = export_lora(adapter, target, *fixed, inside=inside, on_progress=bar)
        else:
            bar.stage("writing the experts")
            notes = export_lora_experts(adapter, target, inside=inside, on_progress=bar)
    shell.say(f"{target}: exported as {form}")
    for note in notes:
        shell.say(f"  - {note}")
    shell.give({"target": target, "as": form, "notes": notes})


def _gates(adapter: Adapter, gates: str | None, task: tuple[int, ...]) -> tuple[Gates, str]:
    """The gates, and what they are for people."""
    if gates is None:
        return task_gates(adapter, task), f"task {', '.join(map(str, task))}"
    if gates == "uniform":
        return uniform_gates(adapter), "uniform"
    return gates_from_file(adapter, gates), f"from {gates}"
