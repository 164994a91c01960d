"""Which expert serves which topic: gate shares per topic, for the module whose router tells the topics apart best."""

from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx
from rich.table import Table

from moe_lora_jax.router_statistics import router_statistics, topic_information
from moe_lora_jax.train.data import TokenData

__all__ = ["expert_table", "gate_shares", "topic_information"]


def gate_shares(
    model: nnx.Module, topics: Mapping[str, TokenData], *, batch_size: int = 16, pad_id: int = 0
) -> Mapping[str, np.ndarray]:
    """{module: [topic, expert]}: the part of the gate weight each expert gets on a topic's tokens; rows sum to 1.

    The tokens are those with loss: prompts often share words that say nothing about the topic.
    """
    return router_statistics(model, topics, batch_size=batch_size, pad_id=pad_id).by_topic


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
