"""`moe-lora train`: fine-tune a mixture-of-LoRA adapter on a Hugging Face model directory."""

import dataclasses
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any, Literal

from moe_lora_interop.checkpoint.read_write import read_with_base
from moe_lora_interop.cli.flags_file import write_file
from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.disk.files import read_json
from moe_lora_interop.errors import ConfigError
from moe_lora_jax.train.settings import TrainSettings


def train(
    model: Path,
    data: Path,
    output_dir: Path,
    *,
    r: int | list[int] | None = None,
    lora_alpha: int | float | list[int | float] | None = None,
    num_experts: int | None = None,
    top_k: int | Literal["all"] | None = None,
    target_modules: tuple[str, ...] | None = None,
    lora_dropout: float | None = None,
    router_aux_loss_coef: float | None = None,
    router_z_loss_coef: float | None = None,
    adapter_config: Path | None = None,
    init_adapter: Path | None = None,
    init_dialect: str | None = None,
    base_name: str | None = None,
    epochs: int = TrainSettings.epochs,
    steps: int | None = TrainSettings.steps,
    batch_size: int = TrainSettings.batch_size,
    gradient_accumulation: int = TrainSettings.gradient_accumulation,
    learning_rate: float = TrainSettings.learning_rate,
    warmup_steps: int = TrainSettings.warmup_steps,
    weight_decay: float = TrainSettings.weight_decay,
    max_grad_norm: float | None = TrainSettings.max_grad_norm,
    train_only: Literal["all", "router", "experts"] = TrainSettings.train_only,
    max_length: int = 512,
    eval_file: Path | None = None,
    eval_fraction: float = 0.0,
    eval_every: int | None = TrainSettings.eval_every,
    checkpoint_every: int | None = TrainSettings.checkpoint_every,
    keep_checkpoints: int = TrainSettings.keep_checkpoints,
    log_every: int = TrainSettings.log_every,
    dtype: Literal["stored", "float32", "bfloat16"] = "stored",
    scan_layers: bool = False,
    remat: bool = False,
    mesh: tuple[str, ...] = (),
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    seed: int = TrainSettings.seed,
    tensorboard: bool = TrainSettings.tensorboard,
    resume: bool = TrainSettings.resume,
    config: Path | None = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int | None:
    """Train an adapter and write it where PEFT and moe-lora can read it.

    OUTPUT_DIR gets the adapter (adapter_config.json, adapter_model.safetensors), a folder `training` with metrics and
    checkpoints, and train.yaml: `--config OUTPUT_DIR/train.yaml --output-dir ANOTHER` does the same again, on one
    machine to the bit. SIGTERM (exit code 0) or Ctrl-C (130) saves a checkpoint; --resume continues from it as if
    nothing had happened.

    Args:
        model: Hugging Face model directory (config.json, safetensors, tokenizer).
        data: JSONL; each line has text, or prompt and completion, or messages.
        output_dir: where the adapter and the run go.
        r: rank of one expert, or one rank per expert; {r}.
        lora_alpha: the scaling is lora_alpha / r; one number, or one per expert; {lora_alpha}.
        num_experts: experts per target module; {num_experts}.
        top_k: experts used per token; {top_k}.
        target_modules: names of linear layers, or all-linear (all but lm_head); {target_modules}.
        lora_dropout: dropout on the experts' input; {lora_dropout}.
        router_aux_loss_coef: weight of the load-balancing loss; {router_aux_loss_coef}.
        router_z_loss_coef: weight of the router z-loss; {router_z_loss_coef}.
        adapter_config: JSON with any fields of adapter_config.json, for those that have no flag. A flag above that is
            given wins over the file.
        init_adapter: continue from this adapter (any readable layout). It brings its own config; of the flags above, a
            dropout or loss coefficient that is given wins over it, 0 too, and the others are refused.
        init_dialect: that layout's name; None detects it.
        base_name: what the adapter calls its base model, for example the id on the Hugging Face Hub. None: the Hub's
            name that the path or config.json tells, else the path.
        epochs: passes over the data.
        steps: optimizer steps, instead of epochs.
        batch_size: rows per forward pass.
        gradient_accumulation: forward passes per optimizer step.
        learning_rate: peak; linear warm-up, cosine decay to 0.
        warmup_steps: steps of warm-up.
        weight_decay: of AdamW.
        max_grad_norm: clip the gradient's global norm; None does not.
        train_only: train all of the adapter, or only its routers or its experts.
        max_length: tokens; longer examples are cut, and counted in the output.
        eval_file: JSONL to evaluate on.
        eval_fraction: or evaluate on this part of the data, which is then not trained on.
        eval_every: steps between evaluations; None evaluates before and after.
        checkpoint_every: steps between checkpoints; None writes one at the end.
        keep_checkpoints: how many to keep.
        log_every: steps between lines of training/metrics.jsonl.
        dtype: of the base model.
        scan_layers: compile the layers as one loop: a smaller program, and what remat needs to save memory on a CPU.
        remat: compute each layer's activations again in the backward pass instead of keeping them.
        mesh: spread the run over all devices, e.g. data=2 fsdp=4; the axes are data, fsdp, tensor and expert. With
            several processes, data alone if nothing is given.
        coordinator: run as one of several processes, all with this HOST:PORT of the first; auto asks the cluster.
        num_processes: how many they are.
        process_id: which one this is, from 0.
        seed: of the initial adapter, dropout and data order.
        tensorboard: also write the metrics as TensorBoard events, into training/tensorboard.
        resume: continue the run in output_dir.
        config: YAML with any of these flags, as name: value; flags on the command line win.
    """
    values = dict(locals())
    if config is not None:
        raise ConfigError(
            "invalid arguments", ["config: read by the command line only, expected the values themselves"]
        )
    settings = TrainSettings(**{f.name: values[f.name] for f in dataclasses.fields(TrainSettings)})
    problems = []
    if not 0 <= eval_fraction < 1:
        problems.append(f"eval_fraction: found {eval_fraction}, expected a number in [0, 1)")
    if eval_fraction and eval_file is not None:
        problems.append("eval_fraction and eval_file: found both, expected at most one")
    if max_length < 2:
        problems.append(f"max_length: found {max_length}, expected an integer >= 2")
    axes = _axes(mesh, problems)
    if problems:
        raise ConfigError("invalid arguments", problems)
    fields = _adapter_fields(values)
    adapter = MoeLoraConfig.from_dict(fields) if init_adapter is None else None

    shell = Shell(quiet=quiet, json=json)
    with shell.progress("importing JAX"):
        import jax
        from flax import nnx

        from moe_lora_jax.adapters.apply import apply_moe_lora
        from moe_lora_jax.adapters.checkpoint import load_adapter
        from moe_lora_jax.adapters.parameter_summary import summary
        from moe_lora_jax.models import load_base_model
        from moe_lora_jax.processes import connect, is_first, once
        from moe_lora_jax.sharding import make_mesh
        from moe_lora_jax.train.data import read_data, split_data
        from moe_lora_jax.train.loop import train as run
        from moe_lora_jax.train.run_dir import check_free
        from moe_lora_jax.train.tokenizer import load_tokenizer, save_tokenizer

        connect(coordinator, num_processes, process_id)
        if not axes and jax.process_count() > 1:
            axes = {"data": jax.device_count()}
        devices = make_mesh(axes) if axes else None
    if not is_first():
        shell = Shell(quiet=True)
    once(lambda: check_free(output_dir, resume=resume))
    with shell.progress("reading the model and the data"):
        tokenizer = load_tokenizer(model)
        wanted = None if dtype == "stored" else dtype
        base = load_base_model(model, dtype=wanted, scan_layers=scan_layers, remat=remat, mesh=devices)
        vocabulary = base.config.vocab_size
        train_data = read_data(data, tokenizer, max_length=max_length, vocab_size=vocabulary)
        eval_data = None
        if eval_file is not None:
            eval_data = read_data(eval_file, tokenizer, max_length=max_length, vocab_size=vocabulary)
        elif eval_fraction:
            train_data, eval_data = split_data(train_data, eval_fraction, seed)
    shell.say(train_data.describe())
    if eval_data is not None:
        shell.say(f"evaluation: {eval_data.describe()}")

    if adapter is not None:
        apply_moe_lora(base, adapter, rngs=nnx.Rngs(seed))
    else:
        assert init_adapter is not None
        start = read_with_base(init_adapter, init_dialect)
        start = dataclasses.replace(start, config=dataclasses.replace(start.config, **fields))
        load_adapter(base, start, rngs=nnx.Rngs(seed))
    shell.say(f"base model: {summary(base).base}")
    if is_first() and not (output_dir / CONFIG_NAME).exists():  # a continuation keeps it
        write_file(output_dir / CONFIG_NAME, {k: v for k, v in values.items() if k not in NOT_REPEATED})
    pad_id = tokenizer.pad_token_id or 0
    result = run(base, train_data, output_dir, settings, eval_data=eval_data, pad_id=pad_id, console=shell.terminal)

    shell.give(
        {
            "output_dir": output_dir,
            "step": result.step,
            "total_steps": result.total_steps,
            "losses": result.losses,
            "eval_losses": result.eval_losses,
            "stopped_by": result.stopped_by and result.stopped_by.name,
            "to_continue": None if result.is_finished else _resume_command(),
        }
    )
    if not result.is_finished:
        if not json and is_first():
            print(f"stopped after step {result.step} of {result.total_steps}; the checkpoint is saved. To continue:")
            print(f"  {_resume_command()}")
        return 0 if result.stopped_by == signal.SIGTERM else 130  # a preempted job has ended in order
    once(lambda: save_tokenizer(tokenizer, output_dir))
    if result.losses:
        first, last = min(result.losses), max(result.losses)
        shell.say(f"training loss {result.losses[first]:.4f} (step {first}) -> {result.losses[last]:.4f} (step {last})")
    if result.eval_losses:
        first, last = min(result.eval_losses), max(result.eval_losses)
        shell.say(f"evaluation loss {result.eval_losses[first]:.4f} -> {result.eval_losses[last]:.4f}")
    shell.say(f"adapter saved in {output_dir}")
    return None


CONFIG_NAME = "train.yaml"
NOT_REPEATED = ("config", "resume", "json", "quiet", "coordinator", "num_processes", "process_id")
# The flags that describe the adapter; those that matter in training only may change what an initial adapter brings.
TRAINING_FLAGS = ("lora_dropout", "router_aux_loss_coef", "router_z_loss_coef")
ADAPTER_FLAGS = ("r", "lora_alpha", "num_experts", "top_k", "target_modules", *TRAINING_FLAGS)
DEFAULTS = {f: getattr(MoeLoraConfig, f) for f in ADAPTER_FLAGS} | {"top_k": "all", "target_modules": "all-linear"}
# so that the help says what a flag is when neither it nor a file is given, and the numbers stay in one place
train.__doc__ = (train.__doc__ or "").format_map(
    {f: f"{value} if nothing says otherwise" for f, value in DEFAULTS.items()}
)


def _adapter_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The config's fields from the flags and the file; beside init_adapter, those that replace what it brings.

    Raises:
        ConfigError: a field that is init_adapter's to say.
    """
    given = {f: values[f] for f in ADAPTER_FLAGS if values[f] is not None}
    base = {} if values["base_name"] is None else {"base_model_name_or_path": values["base_name"], "revision": None}
    if given.get("top_k") == "all":
        given["top_k"] = None
    if "target_modules" in given:
        targets = list(given["target_modules"])
        given["target_modules"] = "all-linear" if targets == ["all-linear"] else targets
    file = values["adapter_config"]
    if values["init_adapter"] is not None:
        wrong = [f for f in given if f not in TRAINING_FLAGS] + (["adapter_config"] if file is not None else [])
        if wrong:
            raise ConfigError("init_adapter brings its own config", [f"{f}: found beside init_adapter" for f in wrong])
        return {**given, **base}
    from_file = read_json(file) if file is not None else {}
    fixed = {"task_type": "CAUSAL_LM"}
    defaults = {"format_version": MoeLoraConfig.format_version, "target_modules": DEFAULTS["target_modules"]}
    return {**defaults, **fixed, **from_file, **given, **base}


def _axes(mesh: tuple[str, ...], problems: list[str]) -> dict[str, int]:
    """{axis: size} of `name=size` words; what is wrong with them goes to `problems`."""
    axes: dict[str, int] = {}
    for word in mesh:
        name, _, size = word.partition("=")
        if not size.isdigit() or name in axes:
            problems.append(f"mesh: found {word!r}, expected name=size, each name once")
        else:
            axes[name] = int(size)
    return axes


def _resume_command() -> str:
    """The command that was given, with --resume."""
    program = os.path.basename(sys.argv[0])
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    return shlex.join([program, *arguments, "--resume"])
