"""Heat maps of gates over the tokens of a text."""

import math

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moe_lora_jax.measure.text_gates import TextGates
from moe_lora_jax.report.style import WIDTH, figure
from moe_lora_jax.report.tokens import shown

PER_LINE = 64
"""Tokens beside each other; a longer text goes on below."""


def plot_text_gates(gates: TextGates) -> Figure:
    """The gates of every token: a panel per router, tokens across, experts down."""
    lines = math.ceil(len(gates.tokens) / PER_LINE)
    width = min(PER_LINE, len(gates.tokens))
    words = [shown(piece).strip() or "·" for piece in gates.tokens]
    experts = max(shares.shape[1] for shares in gates.shares.values())
    height = len(gates.shares) * lines * (1.0 + min(2.2, 0.14 * experts))
    with figure(WIDTH, 0.4 + height, "Gates of every token") as made:
        panels = made.subplots(len(gates.shares) * lines, 1, squeeze=False).flatten()
        for number, axes in enumerate(panels):
            module, start = list(gates.shares)[number // lines], number % lines * PER_LINE
            part = gates.shares[module][start : start + width].T
            image = axes.imshow(part, vmin=0.0, vmax=1.0, aspect="auto")
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            axes.set_xlim(-0.5, width - 0.5)
            labels = words[start : start + width]
            axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7, parse_math=False)
            axes.set_yticks(range(0, len(part), -(-len(part) // 8)))
            axes.set_ylabel("expert")
            if number % lines == 0:
                axes.set_title(module)
        bar = made.colorbar(image, ax=panels, label="gate", format=PercentFormatter(1.0, decimals=0))
        bar.outline.set_visible(False)
    return made
