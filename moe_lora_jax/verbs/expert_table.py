"""Which expert serves which topic: gate shares per topic, for the module whose router tells the topics apart best."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from rich.table import Table

from moe_lora_jax.train.batches import eval_batches
from moe_lora_jax.train.data import Example
from moe_lora_jax.train.health import module_health, router_sums
from moe_lora_jax.train.step import Batch


def gate_shares(
    model: nnx.Module, examples: Mapping[str, Sequence[Example]], *, batch_size: int, pad_id: int
) -> dict[str, np.ndarray]:
    """{module: [topic, expert]}: the part of the gate weight each expert gets on a topic's tokens; rows sum to 1.

    The tokens are those with loss: prompts often share words that say nothing about the topic.
    """
    graphdef, state = nnx.split(model)

    @jax.jit
    def sums(state: nnx.State, batch: Batch) -> dict:
        _, router = nnx.merge(graphdef, state)(batch.input_ids, attention_mask=batch.attention_mask, return_router=True)
        return router_sums(router, batch.loss_mask)

    rows: dict[str, list[np.ndarray]] = {}
    for of_topic in examples.values():
        parts = [sums(state, host.batch) for host in eval_batches(of_topic, batch_size=batch_size, pad_id=pad_id)]
        total = jax.tree.map(lambda *values: sum(values), *parts)
        for module, health in module_health(total).items():
            rows.setdefault(module, []).append(health.shares)
    return {module: np.stack(shares) for module, shares in rows.items()}


def topic_information(shares: np.ndarray) -> float:
    """Mutual information of topic and expert in bits, topics equally likely: 0 if all topics use the experts alike.

    Args:
        shares: [topic, expert], rows sum to 1.
    """
    mean = shares.mean(axis=0)
    ratio = np.where(shares > 0, shares / np.where(mean > 0, mean, 1.0), 1.0)
    return float(np.sum(shares * np.log2(ratio)) / len(shares))


def expert_table(module: str, topics: Sequence[str], shares: np.ndarray) -> Table:
    """Topics down, experts across, in per cent; each topic's favourite is marked."""
    table = Table(title=f"gate share of each expert on tokens with loss, {module}", title_justify="left")
    table.add_column("topic")
    for expert in range(shares.shape[1]):
        table.add_column(f"expert {expert}", justify="right")
    for topic, row in zip(topics, shares, strict=True):
        cells = [f"{100 * share:.0f}%{' *' if e == row.argmax() else '  '}" for e, share in enumerate(row)]
        table.add_row(topic, *cells)
    return table
