"""Lines over layers and over training steps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_lora_jax.adapters.projections import by_projection
from moe_lora_jax.measure.router_statistics import RouterStatistics
from moe_lora_jax.report.style import COLOURS, INK, WIDTH, figure, line_looks

Records = Sequence[Mapping[str, Any]]
"""Lines of training/metrics.jsonl."""


def plot_entropy(statistics: RouterStatistics, *, top_k: int | None = None) -> Figure:
    """Over how many experts a token's gates spread, by layer: mean of -sum_e g log g, divided by log E.

    Args:
        statistics: from `router_statistics`.
        top_k: experts per token, if the same everywhere; a line then shows log k / log E, the most that it allows.
    """
    grid = by_projection(statistics.entropy)
    mean = sum(statistics.entropy.values()) / len(statistics.entropy)
    title = f"Entropy of a token's gates: {mean:.2f} on average; 0 is one expert per token, 1 is all experts alike"
    with figure(WIDTH, 3.0, title) as made:
        axes = made.subplots()
        for look, (name, layers) in zip(line_looks(len(grid)), grid.items(), strict=True):
            places = [0 if layer is None else layer for layer in layers]
            axes.plot(places, [statistics.entropy[m] for m in layers.values()], label=name, **look)
        experts = {len(shares) for shares in statistics.shares.values()}
        if top_k is not None and len(experts) == 1 and top_k < min(experts):
            most = math.log(top_k) / math.log(min(experts))
            axes.axhline(most, color=INK, linewidth=1, linestyle=":", label=f"most that top-{top_k} allows")
        axes.set(xlabel="layer", ylabel="entropy / log E", ylim=(-0.03, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        made.legend(loc="outside right upper")
    return made


def plot_losses(records: Records | Mapping[str, Records]) -> Figure:
    """Training and evaluation loss, in nats per token with loss.

    Args:
        records: lines of training/metrics.jsonl; or those of several runs by name, on one axis.
    """
    runs = records if isinstance(records, Mapping) else {"": records}
    parts = []
    with figure(WIDTH, 3.0, "") as made:
        axes = made.subplots()
        for number, (name, lines) in enumerate(runs.items()):
            of = f" of {name}".replace("$", r"\$") if name else ""
            colours = [COLOURS[(2 * number + n) % len(COLOURS)] for n in (0, 3)]
            if points := [(r["step"], r["lm_loss"]) for r in lines if "lm_loss" in r]:
                axes.plot(*zip(*points, strict=True), color=colours[0], label=f"training{of}, as logged")
                parts.append(f"training{of} {points[0][1]:.3g} to {points[-1][1]:.3g}")
            if points := [(r["step"], r["eval_loss"]) for r in lines if "eval_loss" in r]:
                places = zip(*points, strict=True)
                axes.plot(*places, color=colours[1], marker="o", linestyle="--", label=f"evaluation{of}")
                parts.append(f"evaluation{of} {points[0][1]:.3g} to {points[-1][1]:.3g}")
        title = f"Loss: {', '.join(parts)} nats per token" if len(runs) == 1 else f"Loss of {len(runs)} runs"
        made.suptitle(title, x=0.0, ha="left")
        axes.set(xlabel="step", ylabel="nats per token")
        axes.set_ylim(bottom=0.0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        made.legend(loc="outside right upper")
    return made


def plot_balance(records: Records) -> Figure:
    """How evenly the experts were used during training: largest share anywhere, mean entropy, dead experts.

    Args:
        records: lines of training/metrics.jsonl; those without a router's numbers are skipped.
    """
    routed = [r for r in records if "router_entropy" in r]
    if not routed:
        raise ValueError("nothing to plot: no record has a router's numbers")
    steps, last = [r["step"] for r in routed], routed[-1]
    title = (
        f"Load balance: in the end the largest share of one expert is {last['router_largest_share']:.0%}, "
        f"{last['router_dead_experts']} experts are dead"
    )
    with figure(WIDTH, 3.0, title) as made:
        left, right = made.subplots(1, 2, width_ratios=(3, 2))
        for look, key, label in zip(
            line_looks(2), ("router_largest_share", "router_entropy"), ("largest share of an expert", "mean entropy"),
            strict=True,
        ):  # fmt: skip
            left.plot(steps, [r[key] for r in routed], label=label, **look)
        left.set(xlabel="step", ylabel="share; entropy / log E", ylim=(-0.03, 1.03))
        left.legend(loc="best")
        right.plot(steps, [r["router_dead_experts"] for r in routed], color=COLOURS[3], drawstyle="steps-mid")
        right.set(xlabel="step", ylabel="dead experts, all modules")
        most = max(1, *(r["router_dead_experts"] for r in routed))
        right.set_ylim(-0.05 * most, 1.05 * most)
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(axis="y")
        right.yaxis.set_major_locator(MaxNLocator(integer=True))
    return made
