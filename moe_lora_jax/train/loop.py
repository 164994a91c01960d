"""The training loop: batches through the step, metrics, evaluation, checkpoints, and an orderly end."""

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.stuck_routers import warn_of_stuck_routers
from moe_lora_interop.memory import explained
from moe_lora_interop.progress import no_progress
from moe_lora_jax.adapters.checkpoint import save_pretrained
from moe_lora_jax.layers.mixing import MoeLoraParam
from moe_lora_jax.models.stacked import is_scanned, stack_layers, unstack_layers
from moe_lora_jax.processes import is_first, largest
from moe_lora_jax.sharding import mesh_of, put_rows
from moe_lora_jax.train.batches import HostBatch, TrainBatches, padding_share
from moe_lora_jax.train.best import FOLDER as BEST
from moe_lora_jax.train.best import Best, BestAdapter
from moe_lora_jax.train.checkpoints import Checkpoints, Snapshot
from moe_lora_jax.train.data import TokenData, check_vocabulary
from moe_lora_jax.train.errors import TrainingError
from moe_lora_jax.train.evaluation import mean_loss
from moe_lora_jax.train.extension import extension
from moe_lora_jax.train.health import CollapseWatch, module_health, summary
from moe_lora_jax.train.packing import PackedRows, training_rows
from moe_lora_jax.train.refusals import check_packing, check_reporters, trainable_config
from moe_lora_jax.train.run_dir import RunDirectory, base_fingerprint
from moe_lora_jax.train.settings import TrainSettings
from moe_lora_jax.train.setup import set_up
from moe_lora_jax.train.step import StepMetrics, merge_back
from moe_lora_jax.train.stop_signals import stop_signals

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, str], Any]
OnLog = Callable[[int, Mapping[str, Any]], Any]
STEPS = (
    "a smaller batch_size, with as much more gradient_accumulation, computes the same step",
    "a smaller max_length: activations grow with batch_size and with the longest example",
    "scan_layers (of `load_base_model` and of `moe-lora train`) keeps no activations of a layer, unless remat says so",
    "the base model in bfloat16 takes half of float32 (dtype)",
    "every trained number takes 16 bytes: a smaller r, fewer num_experts or target_modules",
    "the directory keeps the failed run: choose another output_dir, or remove it",
)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    step: optimizer steps done, of total_steps.
    losses: {step: next-token loss} as logged, nats per token.
    eval_losses: {step: the same on the evaluation data}; step 0 is before training.
    stopped_by: the signal that ended it early, SIGTERM or SIGINT.
    best: with `save_best`, which adapter is in the folder `best`.
    """

    output_dir: Path
    step: int
    total_steps: int
    losses: Mapping[int, float]
    eval_losses: Mapping[int, float]
    stopped_by: signal.Signals | None = None
    best: Best | None = None

    @property
    def is_finished(self) -> bool:
        """False: stopped by a signal; a checkpoint is saved, and the adapter as it was then."""
        return self.step >= self.total_steps


def train(
    model: nnx.Module,
    data: TokenData,
    output_dir: str | os.PathLike[str],
    settings: TrainSettings,
    *,
    eval_data: TokenData | None = None,
    on_eval: Callable[[int, nnx.Module], Any] | None = None,
    pad_id: int = 0,
    on_progress: OnStep = no_progress,
    on_log: OnLog | None = None,
) -> TrainResult:
    """Trains the adapter of `model` and writes it to `output_dir`; the model then carries it, in eval mode.

    A run is a function of the model, the data and the settings. SIGTERM or Ctrl-C saves a checkpoint and returns; the
    same call with `resume` then gives the very bits that the uninterrupted run would have given. With every checkpoint
    the adapter is saved, too: a run that was stopped, or is going on, can be loaded from `output_dir`. After an error
    the model carries the adapter that was saved last, if any.

    Args:
        model: with an adapter (`apply_moe_lora` or `load_adapter`).
        data: from `read_data`.
        output_dir: for the adapter, and a folder `training` for the rest (see `run_dir`).
        settings: see `TrainSettings`.
        eval_data: likewise from `read_data`; None does not evaluate.
        on_eval: called after every evaluation with the step and the model, which carries the adapter of that step.
        pad_id: the token that padding is made of; it is masked.
        on_progress: called after every step with its number, how many there are, and a line on how it goes.
        on_log: called with the step and {name: value} for each line of metrics.jsonl: every `log_every` steps with the
            losses, the speed and the routers' state, and after every evaluation with eval_loss.

    Raises:
        TrainingError: no adapter, nothing selected to train, the directory is taken, the checkpoint does not fit, or
            the loss is no longer finite (with the step, the lines of its batch and the last good checkpoint);
            `save_best` without `eval_data`; `packing` with a model that takes no segment_ids.
        DataError: token ids that the model has no row for.
    """
    config = trainable_config(model)
    check_packing(model, settings)
    check_reporters(settings)
    if settings.save_best and eval_data is None:
        raise TrainingError("nothing to choose by", ["save_best: found without eval_data, expected both"])
    for part in (data, eval_data):
        if part is not None:
            check_vocabulary(part, model)
    loop = _Loop(model, config, data, settings, eval_data, on_eval, on_log, pad_id)
    warn_of_stuck_routers(config, config.target_modules if isinstance(config.target_modules, list) else [])
    identity: dict[str, Any] = {
        "settings": settings.fixed(),
        "adapter": config.semantic_dict(),
        "base": base_fingerprint(nnx.split(model, MoeLoraParam, nnx.RngState, ...)[-1]),
        "data": data.digest,
        "eval_data": eval_data.digest if eval_data is not None else None,
    }
    if isinstance(loop.rows, PackedRows):
        identity["row_length"] = loop.rows.length
    with contextlib.ExitStack() as stack:
        if settings.matmul_precision is not None:
            stack.enter_context(jax.default_matmul_precision(settings.matmul_precision))
        growing = ["settings.epochs" if settings.steps is None else "settings.steps"]
        directory = RunDirectory(
            output_dir, identity, resume=settings.resume, growing=growing, report_to=settings.report_to
        )
        run = stack.enter_context(directory)
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(run.checkpoints, settings.keep_checkpoints)))
        stop = stack.enter_context(stop_signals())
        work = f"training with batches of {settings.batch_size} rows of up to {loop.rows.longest} tokens"
        stack.enter_context(explained(work, STEPS))
        loop.start(run, checkpoints)
        stopped = 0
        while loop.step < loop.total_steps and not (stopped := largest(stop.number or 0)):
            loop.advance(on_progress)
        loop.save()
        by = signal.Signals(stopped) if stopped else None
        best = loop.kept.best if loop.kept is not None else None
        return TrainResult(run.output_dir, loop.step, loop.total_steps, loop.losses, loop.eval_losses, by, best)


class _Loop:
    """The moving parts of one run."""

    def __init__(
        self,
        model: nnx.Module,
        config: MoeLoraConfig,
        data: TokenData,
        settings: TrainSettings,
        eval_data: TokenData | None,
        on_eval: Callable[[int, nnx.Module], Any] | None,
        on_log: OnLog | None,
        pad_id: int,
    ):
        self.model, self.data, self.settings = model, data, settings
        self.eval_data, self.on_eval, self.on_log, self.pad_id = eval_data, on_eval, on_log, pad_id
        self.rows = training_rows(data, settings)
        self.total_steps = settings.total_steps(len(self.rows))
        self.schedule, self.state, self.frozen, self.train_step = set_up(model, config, settings, self.total_steps)
        self.evaluated = nnx.graphdef(model)
        self.mesh = mesh_of(self.state.trainable)
        self.batches = TrainBatches(
            self.rows,
            batch_size=settings.batch_size,
            gradient_accumulation=settings.gradient_accumulation,
            epochs=settings.total_epochs(len(self.rows)),
            seed=settings.seed,
            pad_id=pad_id,
        )
        self.step = 0
        self.saved: int | None = None
        self.kept: BestAdapter | None = None
        self.losses: dict[int, float] = {}
        self.eval_losses: dict[int, float] = {}
        self.watch = CollapseWatch(config)
        self.window = Window()

    def start(self, run: RunDirectory, checkpoints: Checkpoints) -> None:
        """Begins, or takes up the newest checkpoint."""
        self.run, self.checkpoints = run, checkpoints
        if checkpoints.latest is not None:
            snapshot = checkpoints.restore(self._snapshot())
            state, adapter = snapshot.state, snapshot.adapter
            if is_scanned(self.model):
                state, adapter = stack_layers((state, adapter))
            self.step, self.state = snapshot.step, state
            self.frozen = self.frozen._replace(adapter=adapter)
            self.batches.restore(snapshot.position)
        if run.grown:
            before = {name.rpartition(".")[2]: number for name, number in run.grown.items()}
            logger.warning(extension(self.settings, before, len(self.rows), self.step))
        run.note_start(self.step, self.total_steps)
        if is_first():
            self._tell_padding()
        if self.settings.save_best:
            self.kept = BestAdapter(run.output_dir / BEST)
        for record in run.open_metrics(self.step):
            for key, losses in (("lm_loss", self.losses), ("eval_loss", self.eval_losses)):
                if key in record:
                    losses[record["step"]] = record[key]
        if self.eval_data is not None and 0 not in self.eval_losses:
            self.evaluate()
        self.window = Window()

    def advance(self, show: OnStep) -> None:
        """One optimizer step, and what is due after it."""
        host = next(self.batches)
        batch = put_rows(host.batch, self.mesh, axis=1)  # the first axis are micro-batches
        self.state, metrics = self.train_step(self.state, self.frozen, batch)
        metrics = jax.device_get(metrics)
        self._check_finite(metrics, host)
        self.step += 1
        self.window.add(metrics)
        text = f"training: loss {float(metrics.lm_loss):.4f}, {self.window.speed:,.0f} tokens/s"
        show(self.step, self.total_steps, text)
        settings, last = self.settings, self.step == self.total_steps
        if self.step % settings.log_every == 0 or last or not self.losses:
            self._log_step(metrics)
        if self.eval_data is not None and (last or _due(self.step, settings.eval_every)):
            self.evaluate()
        if _due(self.step, settings.checkpoint_every):
            self.save()

    def evaluate(self) -> None:
        """The loss on the evaluation data, logged."""
        assert self.eval_data is not None
        states = (self.state.trainable, self.state.rng, *self.frozen)
        size, chunk = self.settings.batch_size, self.settings.loss_chunk
        loss, tokens = mean_loss(
            self.evaluated, states, self.eval_data, batch_size=size, pad_id=self.pad_id, loss_chunk=chunk
        )
        self.eval_losses[self.step] = loss
        self._log({"eval_loss": loss, "eval_tokens": tokens})
        is_best = self.kept is not None and self.kept.is_better(loss)
        if is_best or self.on_eval is not None:
            self._fill_model()
        if self.kept is not None and is_best:
            self.kept.save(self.model, Best(self.step, loss))
        if self.on_eval is not None:
            self.on_eval(self.step, self.model)

    def save(self) -> None:
        """A checkpoint, and the adapter for everybody who loads it."""
        if self.saved == self.step:
            return
        self.checkpoints.save(self._snapshot())
        self._fill_model()
        save_pretrained(self.model, self.run.output_dir)
        self.saved = self.step

    def _tell_padding(self) -> None:
        if isinstance(self.rows, PackedRows):
            logger.info(self.rows.describe())
            return
        settings = self.settings
        share = padding_share(self.rows.lengths, settings.batch_size * settings.gradient_accumulation, settings.seed)
        if share > 0.5:
            logger.warning("%.0f %% of the batches is padding: packing fills rows with several examples", 100 * share)

    def _fill_model(self) -> None:
        """The model then carries the adapter of this step."""
        trainable, rng = jax.tree.map(jnp.copy, (self.state.trainable, self.state.rng))  # the next step donates these
        merge_back(self.model, self.state._replace(trainable=trainable, rng=rng), self.frozen)

    def _snapshot(self) -> Snapshot:
        """Layer by layer, whether the layers run as a scan or not."""
        state, adapter = unstack_layers((self.state, self.frozen.adapter))
        return Snapshot(self.step, state, adapter, self.batches.state())

    def _log(self, metrics: Mapping[str, Any]) -> None:
        self.run.log({"step": self.step, **metrics})
        if self.on_log is not None:
            self.on_log(self.step, metrics)

    def _log_step(self, metrics: StepMetrics) -> None:
        health = module_health(self.window.router)
        self.watch.check(self.step, health)
        self.losses[self.step] = float(metrics.lm_loss)
        self._log(
            {
                "loss": float(metrics.loss),
                "lm_loss": float(metrics.lm_loss),
                "load_balancing_loss": float(metrics.load_balancing_loss),
                "router_z_loss": float(metrics.router_z_loss),
                "learning_rate": float(self.schedule(self.step - 1)),
                "grad_norm": float(metrics.grad_norm),
                "tokens_per_second": round(self.window.speed, 1),
                **summary(health),
                "router": {module: state.to_dict() for module, state in health.items()},
            }
        )
        self.window = Window()

    def _check_finite(self, metrics: StepMetrics, host: HostBatch) -> None:
        if math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm):
            return
        lines = ", ".join(str(line) for line in sorted(set(host.lines.tolist()) - {0}))
        good = self.checkpoints.latest
        raise TrainingError(
            f"step {self.step + 1}: the loss is {float(metrics.loss)}, the gradient norm {float(metrics.grad_norm)}",
            [
                f"batch: lines {lines} of {self.data.file}",
                f"last good checkpoint: {self.run.checkpoints / str(good) if good is not None else 'none'}",
                "try a lower learning_rate, more warmup_steps or a smaller max_grad_norm",
            ],
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


@dataclass
class Window:
    """Sums since the last logged step."""

    started: float = field(default_factory=time.perf_counter)
    tokens: float = 0.0
    router: dict[str, Any] = field(default_factory=dict)

    def add(self, metrics: StepMetrics) -> None:
        self.tokens += float(metrics.tokens)
        self.router = jax.tree.map(np.add, self.router, metrics.router) if self.router else metrics.router

    @property
    def speed(self) -> float:
        return self.tokens / max(time.perf_counter() - self.started, 1e-9)
