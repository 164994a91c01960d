"""`moe-lora train`: fine-tune a mixture-of-LoRA adapter on a Hugging Face model directory."""

import dataclasses
import signal
import sys
from functools import partial
from pathlib import Path

import jax
from flax import nnx
from tyro.conf import OmitArgPrefixes

from moe_lora_interop.checkpoint.read_write import read_with_base
from moe_lora_interop.cli.flags_file import write_file
from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.disk.hub import model_directory
from moe_lora_interop.errors import ConfigError
from moe_lora_jax.adapters.apply import apply_moe_lora
from moe_lora_jax.adapters.checkpoint import load_adapter
from moe_lora_jax.adapters.parameter_summary import summary
from moe_lora_jax.cli.log_lines import LogLines
from moe_lora_jax.cli.train_flags import AdapterFlags, DataFlags, MachineFlags, SettingsFlags
from moe_lora_jax.models import load_base_model
from moe_lora_jax.processes import connect, is_first, once
from moe_lora_jax.sharding import make_mesh
from moe_lora_jax.train.best import FOLDER as BEST
from moe_lora_jax.train.data import read_data, split_data
from moe_lora_jax.train.end_of_text import write_end_ids
from moe_lora_jax.train.loop import TrainResult
from moe_lora_jax.train.loop import train as run
from moe_lora_jax.train.packing import PackedRows, training_rows
from moe_lora_jax.train.refusals import check_reporters
from moe_lora_jax.train.run_dir import check_free, command
from moe_lora_jax.train.tokenizer import load_tokenizer, pad_id, save_tokenizer

CONFIG_NAME = "train.yaml"
# What a repetition says anew: it continues no run, and finds its own processes.
NOT_REPEATED = ("resume", "coordinator", "num_processes", "process_id")


def train(
    model: Path,
    data: Path,
    output_dir: Path,
    *,
    adapter: OmitArgPrefixes[AdapterFlags] = AdapterFlags(),  # noqa: B008  frozen
    settings: OmitArgPrefixes[SettingsFlags] = SettingsFlags(),  # noqa: B008
    examples: OmitArgPrefixes[DataFlags] = DataFlags(),  # noqa: B008
    machine: OmitArgPrefixes[MachineFlags] = MachineFlags(),  # noqa: B008
    revision: str | None = None,
    config: Path | None = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int | None:
    """Train an adapter and write it where PEFT and moe-lora can read it.

    OUTPUT_DIR gets the adapter (adapter_config.json, adapter_model.safetensors), a folder `training` with metrics and
    checkpoints, and train.yaml: `--config OUTPUT_DIR/train.yaml --output-dir ANOTHER` does the same again, on one
    machine to the bit. SIGTERM (exit code 0) or Ctrl-C (130) saves a checkpoint; --resume continues from it as if
    nothing had happened, and with more --steps or --epochs goes on beyond the end. The adapter in OUTPUT_DIR is that of
    the newest checkpoint, also while the run goes on.

    Args:
        model: Hugging Face model directory (config.json, safetensors, tokenizer), or an id on the Hub, owner/name.
        data: JSONL; each line has text, or prompt and completion, or messages. Also a JSON array of such objects, .gz
            of either, or parquet.
        output_dir: where the adapter and the run go.
        revision: branch, tag or commit of an id.
        config: YAML with any of these flags, as name: value; flags on the command line win.
    """
    if config is not None:
        problem = "config: read by the command line only, expected the values themselves"
        raise ConfigError("invalid arguments", [problem])
    checked = settings.checked()
    problems = examples.problems() + machine.problems()
    if checked.save_best and examples.eval_file is None and not examples.eval_fraction:
        problems.append("save_best: found without evaluation data, expected eval_file or eval_fraction")
    if problems:
        raise ConfigError("invalid arguments", problems)
    fields = adapter.fields()
    fresh = MoeLoraConfig.from_dict(fields) if adapter.init_adapter is None else None

    shell = Shell(quiet=quiet, json=json)
    with shell.progress("starting JAX"):
        connect(machine.coordinator, machine.num_processes, machine.process_id)
        axes = machine.axes() or ({"data": jax.device_count()} if jax.process_count() > 1 else {})
        mesh = make_mesh(axes) if axes else None
    if not is_first():
        shell = Shell(quiet=True)
    once(lambda: check_free(output_dir, resume=checked.resume))
    check_reporters(checked)
    found = model_directory(model, revision, quiet=quiet)
    with shell.progress("reading the model and the data"):
        tokenizer = load_tokenizer(found, examples.chat_template)
        base = load_base_model(found, mesh=mesh, **machine.arguments())
        vocabulary = base.config.vocab_size
        read = partial(read_data, tokenizer=tokenizer, max_length=examples.max_length, vocab_size=vocabulary)
        train_data, eval_data = read(data), None
        if examples.eval_file is not None:
            eval_data = read(examples.eval_file)
        elif examples.eval_fraction:
            train_data, eval_data = split_data(train_data, examples.eval_fraction, checked.seed)
    shell.say(train_data.describe())
    rows = training_rows(train_data, checked)
    if isinstance(rows, PackedRows):
        shell.say(rows.describe())
    if eval_data is not None:
        shell.say(f"evaluation: {eval_data.describe()}")

    rngs = nnx.Rngs(checked.seed)
    if fresh is not None:
        apply_moe_lora(base, fresh, rngs=rngs)
    else:
        assert adapter.init_adapter is not None
        start = read_with_base(adapter.init_adapter, adapter.init_layout)
        load_adapter(base, dataclasses.replace(start, config=dataclasses.replace(start.config, **fields)), rngs=rngs)
    shell.say(f"base model: {summary(base).base}")
    if is_first() and not (output_dir / CONFIG_NAME).exists():  # a continuation keeps it
        values = {"model": model, "data": data, "output_dir": output_dir, "revision": revision}
        for group in (adapter, settings, examples, machine):
            values |= dataclasses.asdict(group)
        write_file(output_dir / CONFIG_NAME, {k: v for k, v in values.items() if k not in NOT_REPEATED})
    if is_first():
        write_end_ids(output_dir, base, tokenizer)
    pad = pad_id(tokenizer, vocabulary)
    lines = LogLines(shell, checked.total_steps(len(rows)))
    with shell.progress("compiling the step") as bar:
        result = run(
            base, train_data, output_dir, checked, eval_data=eval_data, pad_id=pad, on_progress=bar, on_log=lines
        )
    once(lambda: save_tokenizer(tokenizer, output_dir))
    return _tell(result, shell)


def _tell(result: TrainResult, shell: Shell) -> int | None:
    """Says how the run ended; the exit code."""
    shell.give(
        {
            "output_dir": result.output_dir,
            "step": result.step,
            "total_steps": result.total_steps,
            "losses": result.losses,
            "eval_losses": result.eval_losses,
            "best": result.best and result.best._asdict(),
            "stopped_by": result.stopped_by and result.stopped_by.name,
            "to_continue": None if result.is_finished else _resume_command(),
        }
    )
    if not result.is_finished:
        if not shell.json and is_first():
            print(f"stopped after step {result.step} of {result.total_steps}; the checkpoint is saved.")
            print(f"The adapter of this step is in {result.output_dir}. To continue:")
            print(f"  {_resume_command()}")
        return 0 if result.stopped_by == signal.SIGTERM else 130  # a preempted job has ended in order
    if losses := result.losses:
        first, last = min(losses), max(losses)
        shell.say(f"training loss {losses[first]:.4f} (step {first}) -> {losses[last]:.4f} (step {last})")
    if losses := result.eval_losses:
        shell.say(f"evaluation loss {losses[min(losses)]:.4f} -> {losses[max(losses)]:.4f}")
    if best := result.best:
        shell.say(f"lowest evaluation loss {best.eval_loss:.4f}, after step {best.step}: {result.output_dir / BEST}")
    shell.say(f"adapter saved in {result.output_dir}")
    return None


def _resume_command() -> str:
    """The command that was given, with --resume."""
    return command() if "--resume" in sys.argv else f"{command()} --resume"
