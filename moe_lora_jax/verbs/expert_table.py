"""Which expert serves which topic: gate shares per topic, as a table for the terminal."""

from collections.abc import Sequence

import numpy as np
from rich.table import Table


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
