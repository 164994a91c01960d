"""What exports measure on data: average gates, and how far an exported LoRA is from the mixture it came from."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.export.plain_lora import read_plain_lora
from moe_lora_interop.progress import OnProgress, no_progress, tracked
from moe_lora_jax.adapters.checkpoint import load_adapter
from moe_lora_jax.models import load_base_model
from moe_lora_jax.train.batches import eval_batches
from moe_lora_jax.train.data import read_data
from moe_lora_jax.train.evaluation import run_batches, split_for_evaluation
from moe_lora_jax.train.step import Batch
from moe_lora_jax.train.tokenizer import load_tokenizer

BATCH_SIZE = 8


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
    batches = _batches(base, data, max_length)
    model = load_adapter(load_base_model(base), adapter)
    computed = run_batches(_real_gates, *split_for_evaluation(model), batches)
    totals: dict[str, np.ndarray] = {}
    for _, gates in zip(tracked(batches, on_progress), computed, strict=True):
        for name, values in gates.items():
            totals[name] = totals.get(name, 0.0) + np.asarray(values, np.float64).sum(axis=(0, 1))
    factor = adapter.config.routed_scaling_factor
    return {name: (factor * total / _tokens(batches)).tolist() for name, total in totals.items()}


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
    batches, compare = _batches(base, data, max_length), partial(_compare, task=task)
    full = load_adapter(load_base_model(base), adapter)
    found = {}
    for name, other in tracked(others.items(), on_progress):
        model = load_base_model(base)
        pair = (full, model if other is None else load_adapter(model, other))
        computed = run_batches(compare, *split_for_evaluation(pair), batches)
        kl, same, tokens = np.sum([sums.astype(np.float64) for sums in computed], axis=0)
        found[name] = Agreement(kl=float(kl / tokens), top1=float(same / tokens))
    return ExportReport(found, _tokens(batches), data)


def _batches(base: Path, data: Path, max_length: int) -> list[Batch]:
    tokenizer = load_tokenizer(base)
    examples = read_data(data, tokenizer, max_length=max_length).examples
    pad_id = tokenizer.pad_token_id or 0
    return [host.batch for host in eval_batches(examples, batch_size=BATCH_SIZE, pad_id=pad_id)]


def _tokens(batches: Sequence[Batch]) -> int:
    return int(sum(batch.attention_mask.sum() for batch in batches))


def _real_gates(model: Any, batch: Batch) -> dict[str, jax.Array]:
    """{router: gates}, 0 on padding."""
    _, router = model(batch.input_ids, attention_mask=batch.attention_mask, return_router=True)
    mask = batch.attention_mask
    return {name: out.gates * mask.reshape(*mask.shape, *[1] * (out.gates.ndim - 2)) for name, out in router.items()}


def _compare(pair: tuple[Any, Any], batch: Batch, *, task: tuple[int, ...]) -> jax.Array:
    """Sums over real tokens: KL, how often the largest is the same, tokens. The first of the pair gets the task."""
    rows, mask = batch.input_ids.shape[0], batch.attention_mask
    ids = jnp.asarray(task[0] if len(task) == 1 else task)
    tasks = {"task_ids": jnp.broadcast_to(ids, (rows, *ids.shape))} if task else {}
    full = pair[0](batch.input_ids, attention_mask=mask, **tasks)
    other = pair[1](batch.input_ids, attention_mask=mask)
    log_p, log_q = (jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) for logits in (full, other))
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    same = jnp.argmax(full, axis=-1) == jnp.argmax(other, axis=-1)
    real = (mask > 0).astype(jnp.float32)
    return jnp.stack([jnp.sum(kl * real), jnp.sum(same * real), jnp.sum(real)])
