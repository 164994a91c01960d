"""What exports measure on data: average gates, and how far an exported LoRA is from the mixture it came from."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.export.plain_lora import read_plain_lora
from moe_lora_interop.progress import OnProgress, no_progress, tracked
from moe_lora_jax.adapters.checkpoint import load_adapter
from moe_lora_jax.models import CausalLM, load_base_model
from moe_lora_jax.train.batches import eval_batches
from moe_lora_jax.train.data import Example, read_data
from moe_lora_jax.train.step import Batch
from moe_lora_jax.train.tokenizer import load_tokenizer, pad_id

BATCH_SIZE = 8
Forward = Callable[[Batch], Any]


def mean_gates(
    adapter: Adapter, base: Path, data: Path, *, max_length: int, on_progress: OnProgress = no_progress
) -> dict[str, list]:
    """The gates of every router times routed_scaling_factor, averaged over all tokens of a data file. Progress is
    counted in batches.

    Returns:
        {module, block or "model": one number per expert, or a list of such lists with n_splits}.

    Raises:
        CheckpointError, ConfigError, DataError: the base or the data cannot be read, or do not fit.
    """
    model = load_base_model(base)
    forward = _forward(load_adapter(model, adapter), with_router=True)
    totals: dict[str, np.ndarray] = {}
    tokens = 0.0
    for batch in tracked(_batches(model, base, data, max_length), on_progress):
        _, router = forward(batch)
        tokens += float(batch.attention_mask.sum())
        for name, output in router.items():
            real = batch.attention_mask.reshape(*batch.attention_mask.shape, *[1] * (output.gates.ndim - 2))
            totals[name] = totals.get(name, 0.0) + np.asarray(output.gates * real, np.float64).sum(axis=(0, 1))
    factor = adapter.config.routed_scaling_factor
    return {name: (factor * total / tokens).tolist() for name, total in totals.items()}


@dataclass(frozen=True)
class Agreement:
    """How near another model's next-token distributions q are to the mixture's p, over the tokens of some text.

    kl: mean of sum_v p_v log(p_v / q_v), nats. top1: part of the tokens at which both put the same word first.
    """

    kl: float
    top1: float


@dataclass(frozen=True)
class ExportReport:
    """What an export costs; as text, a table.

    models: {name: its agreement with the full mixture}. tokens: of the text of `data`.
    """

    models: Mapping[str, Agreement]
    tokens: int
    data: Path

    def __str__(self) -> str:
        columns = f"{'against the full mixture':<28}{'KL, nats':>12}{'same top-1':>12}"
        head = f"{columns}   ({self.tokens} tokens of {self.data})"
        rows = (f"{name:<28}{found.kl:>12.6f}{found.top1:>12.2%}" for name, found in self.models.items())
        return "\n".join([head, *rows])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "data": str(self.data)}


def export_report(
    adapter: Adapter,
    exported: str | os.PathLike[str],
    base: Path,
    data: Path,
    *,
    max_length: int,
    task: tuple[int, ...] = (),
    on_progress: OnProgress = no_progress,
) -> ExportReport:
    """The exported LoRA (or each of its expert folders), and the bare base, against the full mixture.

    Args:
        adapter: the mixture.
        exported: the directory that `moe-lora export` wrote.
        base: the base model's directory.
        data: JSONL.
        max_length: tokens of an example that are used.
        task: the task ids that the mixture gets; one, or several to average.
        on_progress: called with (done, total) in models compared.

    Raises:
        CheckpointError, ConfigError, DataError: something cannot be read, or does not fit.
    """
    others: dict[str, Adapter | None] = {"base without adapter": None}
    directory = Path(exported)
    folders = sorted(directory.glob("expert_*"), key=lambda p: int(p.name.removeprefix("expert_")))
    others |= {path.name: read_plain_lora(path) for path in folders or [directory]}
    ids = jnp.asarray([task if len(task) > 1 else task[0]]) if task else None
    mixture = load_base_model(base)
    full = _forward(load_adapter(mixture, adapter), task=ids)
    batches = _batches(mixture, base, data, max_length)
    found = {}
    for name, other in tracked(others.items(), on_progress):
        model = load_base_model(base)
        found[name] = agreement(full, _forward(load_adapter(model, other) if other is not None else model), batches)
    return ExportReport(found, int(sum(batch.attention_mask.sum() for batch in batches)), data)


def agreement(full: Forward, other: Forward, batches: Collection[Batch]) -> Agreement:
    """The `Agreement` of two models, each a function from a batch to logits [batch, seq, vocab]."""
    sums = np.zeros(3)
    for batch in batches:
        sums += np.asarray(_compare(full(batch), other(batch), batch.attention_mask), np.float64)
    return Agreement(kl=float(sums[0] / sums[2]), top1=float(sums[1] / sums[2]))


@jax.jit
def _compare(full: jax.Array, other: jax.Array, mask: jax.Array) -> jax.Array:
    """Sums over real tokens: KL, how often the largest is the same, tokens."""
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (full, other))
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    same = jnp.argmax(full, axis=-1) == jnp.argmax(other, axis=-1)
    real = (mask > 0).astype(jnp.float32)
    return jnp.stack([jnp.sum(kl * real), jnp.sum(same * real), jnp.sum(real)])


def _forward(model: CausalLM | nnx.Module, *, with_router: bool = False, task: jax.Array | None = None) -> Forward:
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, batch: Batch) -> Any:
        rows = batch.input_ids.shape[0]
        ids = {} if task is None else {"task_ids": jnp.broadcast_to(task, (rows, *task.shape[1:]))}
        merged: Any = nnx.merge(graphdef, state)
        return merged(batch.input_ids, attention_mask=batch.attention_mask, return_router=with_router, **ids)

    return lambda batch: run(state, batch)


def _batches(model: CausalLM, base: Path, data: Path, max_length: int) -> list[Batch]:
    tokenizer, vocabulary = load_tokenizer(base), model.config.vocab_size
    examples: tuple[Example, ...] = read_data(data, tokenizer, max_length=max_length, vocab_size=vocabulary).examples
    pad = pad_id(tokenizer, vocabulary)
    return [host.batch for host in eval_batches(examples, batch_size=BATCH_SIZE, pad_id=pad)]
