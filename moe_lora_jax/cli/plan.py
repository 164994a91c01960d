"""`moe-lora plan`: will a training run fit on devices that are not here, and what will it cost there?"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from flax import nnx
from tyro.conf import OmitArgPrefixes

from moe_lora_interop.checkpoint.read_write import read
from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.disk.hub import config_directory
from moe_lora_interop.errors import ConfigError
from moe_lora_jax.adapters.apply import apply_moe_lora
from moe_lora_jax.cli.train_flags import AdapterFlags, ProgramFlags
from moe_lora_jax.compiled import Buffer, topology
from moe_lora_jax.models import abstract_base_model
from moe_lora_jax.sharding import make_mesh
from moe_lora_jax.train.planning import Plan, lora_of
from moe_lora_jax.train.planning import plan as run
from moe_lora_jax.train.settings import TrainSettings

_ARGUMENTS = {
    "state.trainable": "trained",
    "state.opt_state": "optimizer",
    "frozen.adapter": "adapter",
    "frozen.base": "base model",
}


def plan(
    model: Annotated[str, tyro.conf.arg(aliases=("--config",))],
    topology: str,
    *,
    seq: Annotated[int, tyro.conf.arg(aliases=("--max-length",))],
    batch_size: Annotated[int, tyro.conf.arg(aliases=("--batch",))] = TrainSettings.batch_size,
    gradient_accumulation: int = TrainSettings.gradient_accumulation,
    loss_chunk: int | None = TrainSettings.loss_chunk,
    train_only: Literal["all", "router", "experts"] = TrainSettings.train_only,
    weight_decay: float = TrainSettings.weight_decay,
    max_grad_norm: float | None = TrainSettings.max_grad_norm,
    adapter: OmitArgPrefixes[AdapterFlags] = AdapterFlags(),  # noqa: B008  frozen
    program: OmitArgPrefixes[ProgramFlags] = ProgramFlags(),  # noqa: B008
    compare: Literal["lora"] | None = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int | None:
    """Say whether a training run fits on devices that are not here, and what a step costs.

    Compiles the step that `train` would run with these flags, by the devices' own compiler, on this machine. No weights
    are read. Evaluation, saving, waiting for other chips and the Pallas kernels' cycles are not in the numbers. For
    GPUs attention is chunked: cuDNN's cannot be compiled without one. Exit code 1: it does not fit.

    Args:
        model: config.json, a Hugging Face model directory (with or without weights), or an id on the Hub.
        topology: TPU generation and chips: v5e:4x4, v6e:2x4, v5p:2x2x4; or GPUs: h100:8 (extra plan-gpu; no cycles).
        seq: tokens of the longest row.
        batch_size: rows of one forward pass.
        gradient_accumulation: forward passes per optimizer step.
        loss_chunk: tokens of a row whose logits exist at once; None chooses as train does.
        train_only: all, or only the router or the experts.
        weight_decay: of AdamW.
        max_grad_norm: the gradient's global norm is clipped to this; None does not clip.
        compare: also compile LoRA with as many numbers, and say what the mixture takes over it.
    """
    problems = program.problems()
    if seq < 2:
        problems.append(f"seq: found {seq}, expected an integer >= 2")
    if problems:
        raise ConfigError("invalid arguments", problems)
    settings = TrainSettings(
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        loss_chunk=loss_chunk,
        train_only=train_only,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
    )
    config = _adapter_config(adapter)
    compared = lora_of(config) if compare else None
    source = config_directory(model)
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: chips that are here stay free

    shell = Shell(quiet=quiet, json=json)
    with shell.progress(f"compiling for {topology}"):
        found = _planned(source, topology, settings, config, program, seq)
    against = None
    if compared is not None:
        with shell.progress("compiling LoRA"):
            against = _planned(source, topology, settings, compared, program, seq)
    shell.give({**_numbers(found), "lora": None if against is None else _numbers(against)})
    if not json:
        print("\n".join([*_lines(found, topology), *([] if against is None else _comparison(found, against))]))
    return None if found.fits else 1


def _planned(
    source: Path, words: str, settings: TrainSettings, config: MoeLoraConfig, program: ProgramFlags, seq: int
) -> Plan:
    devices = topology(words).devices
    mesh = make_mesh(program.axes() or {"data": len(devices)}, devices=devices)
    base = abstract_base_model(source, mesh=mesh, **program.arguments())
    apply_moe_lora(base, config, rngs=nnx.Rngs(0))
    return run(base, settings, max_length=seq)


def _adapter_config(adapter: AdapterFlags) -> MoeLoraConfig:
    fields = adapter.fields()
    if adapter.init_adapter is None:
        return MoeLoraConfig.from_dict(fields)
    return dataclasses.replace(read(adapter.init_adapter, adapter.init_layout).config, **fields)


def _numbers(plan: Plan) -> dict[str, Any]:
    """For --json: bytes on one device."""
    return {
        "fits": plan.fits,
        "devices": plan.devices,
        "kind": plan.kind,
        "usable_bytes": plan.usable,
        "needed_bytes": plan.needed,
        "arguments": plan.memory.arguments,
        "temporaries": plan.memory.temporaries,
        "step_total": plan.memory.total,
        "program": plan.code,
        "kept_beside": plan.kept,
        "largest_buffers": [dataclasses.asdict(buffer) for buffer in plan.memory.buffers],
        "cycles": None if plan.cycles is None else plan.cycles.total,
        "kernels_without_cycles": None if plan.cycles is None else list(plan.cycles.kernels),
        "refusal": plan.refusal,
    }


def _lines(plan: Plan, words: str) -> list[str]:
    too_much = plan.needed - plan.usable
    verdict = "fits" if plan.fits else f"does not fit: {_size(too_much)} too much"
    lines = [
        f"{words}: {plan.devices} x {plan.kind}, {_size(plan.usable)} each",
        f"{verdict} ({_size(plan.needed)} needed)",
        f"  {_size(plan.memory.arguments):>10}  arguments: base model, adapter, optimizer, batch",
        f"  {_size(plan.memory.temporaries):>10}  temporaries, at their peak",
        f"  {_size(plan.kept):>10}  kept beside the step: the model as loaded, where the step has a copy",
        *([f"  {_size(plan.code):>10}  the program itself"] if plan.code else []),
        "largest buffers, on one of them:",
        *(f"  {_size(buffer.bytes):>10}  {buffer.shape}  {_origin(buffer)}" for buffer in plan.memory.buffers),
    ]
    if plan.cycles is not None:
        kernels = f", without {len(plan.cycles.kernels)} Pallas kernels" if plan.cycles.kernels else ""
        lines.append(
            f"cycles of a step: {plan.cycles.total / 1e6:,.1f} million{kernels}; waiting for chips not counted"
        )
    return lines


def _comparison(plan: Plan, lora: Plan) -> list[str]:
    line = f"LoRA with as many parameters: {_size(lora.needed)} needed"
    if plan.cycles is None or lora.cycles is None:
        return [line]
    ratio = plan.cycles.total / max(lora.cycles.total, 1)
    return [f"{line}, {lora.cycles.total / 1e6:,.1f} million cycles; the mixture takes {ratio:.3f} of them"]


def _origin(buffer: Buffer) -> str:
    """Where a buffer comes from: an argument's name, or the end of an operation's and its line in the code."""
    name = buffer.op_name
    for prefix, what in _ARGUMENTS.items():
        if name.startswith(prefix):
            return f"{what} {'.'.join(part for part in _keys(name) if part != 'base_layer' and not part.isdigit())}"
    if not name:
        return "of the compiler's own"
    passed = "backward " if "transpose(" in name else ""
    return f"{passed}{name.rpartition('/')[2]}  {buffer.source}".strip()


def _keys(name: str) -> Sequence[str]:
    """frozen.base['model']['norm']['weight'].value -> model, norm, weight."""
    return [part.strip("'") for bracket in name.split("[")[1:] for part in [bracket.partition("]")[0]]]


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**29 else f"{number / 2**20:.1f} MiB"
