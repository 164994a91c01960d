"""Heat maps over modules: which expert is used where, for which topic, and how alike the experts are."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moe_lora_jax.adapters.projections import by_projection
from moe_lora_jax.measure.router_statistics import RouterStatistics, router_statistics, topic_information
from moe_lora_jax.measure.text_gates import text_gates
from moe_lora_jax.report.similarity import mean_pairs
from moe_lora_jax.report.style import WIDTH, figure, heat_map
from moe_lora_jax.report.token_map import plot_text_gates
from moe_lora_jax.train.data import TokenData

_PERCENT = PercentFormatter(1.0, decimals=0)


def plot_router(
    source: nnx.Module | RouterStatistics | Mapping[str, Any],
    data: TokenData | Mapping[str, TokenData] | str | None = None,
    *,
    tokenizer: Any = None,
    modules: str | Sequence[str] | None = None,
    batch_size: int = 8,
    pad_id: int = 0,
) -> Figure:
    """Which expert is used how much.

    On data: one heat map per projection, a row per layer, a column per expert. On a text: one per router, a column per
    token, a row per expert.

    Example:
        >>> mlj.plot_router(model, data).savefig("router.png")
        >>> mlj.plot_router(model, "what is two plus two", tokenizer=tokenizer)

    Args:
        source: a model with an adapter, what `router_statistics` returned, or {module: weights [expert] or
            [row, expert]}, whose rows are averaged.
        data: for a model: from `read_data`, or several by topic; or a text.
        tokenizer: of the base model; needed for a text.
        modules: of a text: the routers to show; None: the three that tell its tokens apart best.
        batch_size: rows of one forward pass.
        pad_id: the token that padding is made of; it is masked.

    Returns:
        A matplotlib figure, without a window.
    """
    if isinstance(data, str):
        if tokenizer is None or not isinstance(source, nnx.Module):
            raise ValueError("plot_router of a text needs a model and its tokenizer (tokenizer=)")
        return plot_text_gates(text_gates(source, tokenizer, data).of(modules))
    if tokenizer is not None or modules is not None:
        raise ValueError("plot_router: found tokenizer or modules without a text, expected them only with it")
    if isinstance(source, nnx.Module):
        if data is None:
            raise ValueError("plot_router of a model needs data: which experts are used depends on the input")
        source = router_statistics(source, data, batch_size=batch_size, pad_id=pad_id)
    shares = {m: _normalised(s) for m, s in (source.shares if isinstance(source, RouterStatistics) else source).items()}
    if not shares:
        raise ValueError("nothing to plot: no module has a router")
    experts = sorted({len(s) for s in shares.values()})
    uniform = ", ".join(f"{100 / n:.3g} %" for n in reversed(experts))
    grid = by_projection(shares)
    columns = max(1, min(len(grid), 4 if experts[-1] <= 16 else 2))
    lines = math.ceil(len(grid) / columns)
    heights = max(1.1, min(3.4, 0.55 + 0.22 * max(len(layers) for layers in grid.values())))
    high = max(float(np.max(s)) for s in shares.values())
    title = f"Share of gate weight per expert; uniform use would be {uniform}"
    with figure(WIDTH, 0.5 + lines * heights, title) as made:
        panels = made.subplots(lines, columns, squeeze=False).flatten()
        for axes in panels[len(grid) :]:
            axes.set_axis_off()
        for axes, (name, layers) in zip(panels, grid.items(), strict=False):
            values = np.full((len(layers), max(len(shares[m]) for m in layers.values())), np.nan)
            for row, module in enumerate(layers.values()):
                values[row, : len(shares[module])] = shares[module]
            rows = ["" if layer is None else layer for layer in layers]
            text = ".0%" if len(rows) <= 12 and values.shape[1] * columns <= 20 else ""  # if it fits into the cells
            image = heat_map(axes, values, rows=rows, low=0.0, high=high, text=text)
            axes.set_title(name)
            axes.set_xlabel("expert")
            axes.set_ylabel("layer" if None not in layers else "")
        bar = _bar(made, image, panels, label="share of gate weight", format=_PERCENT, aspect=15 * lines)
        for n in experts:
            bar.ax.axhline(1 / n, color="white", linewidth=2.5)
            bar.ax.axhline(1 / n, color="black", linewidth=1)
    return made


def plot_topics(statistics: RouterStatistics) -> Figure:
    """Which topic uses which expert, where the router tells the topics apart best; and how well all modules do.

    The measure is the mutual information of topic and expert in bits, topics equally likely.
    """
    bits = {module: topic_information(shares) for module, shares in statistics.by_topic.items()}
    best = max(bits, key=lambda module: bits[module])
    shares, grid = statistics.by_topic[best], by_projection(bits)
    most = math.log2(min(shares.shape))
    title = f"Topics and experts: {bits[best]:.2f} bits per token in {best}; complete separation would be {most:.2f}"
    height = _height(len(statistics.topics), *map(len, grid.values()))
    with figure(WIDTH, height, title) as made:
        left, right = made.subplots(1, 2, width_ratios=(3, 2))
        text = ".0%" if shares.shape[1] <= 8 else ""
        image = heat_map(left, shares, rows=statistics.topics, low=0.0, high=float(shares.max()), text=text)
        left.set_title(best)
        left.set_xlabel("expert")
        _bar(made, image, left, label="share of gate weight", format=_PERCENT)
        _by_layer(made, right, grid, bits, low=0.0, high=max(max(bits.values()), 1e-9), label="bits per token")
        right.set_title("all modules")
    return made


def plot_similarity(similarity: Mapping[str, np.ndarray]) -> Figure:
    """How alike the experts of each module are, and the experts of the module where they are most alike.

    Args:
        similarity: from `delta_similarity`.
    """
    means = {module: mean_pairs(matrix) for module, matrix in similarity.items()}
    grid, known = by_projection(means), {m: v for m, v in means.items() if np.isfinite(v)}
    if not known:
        raise ValueError("nothing to plot: every expert's delta is zero, so the adapter is not trained")
    most = max(known, key=lambda module: known[module])
    overall = float(np.mean(list(known.values())))
    title = f"Cosine similarity of what two experts add, B A: {overall:.2f} on average; 0 is unrelated, 1 the same"
    height = _height(8, *map(len, grid.values()))
    with figure(WIDTH, height, title) as made:
        left, right = made.subplots(1, 2, width_ratios=(3, 2))
        low, high = min(0.0, *known.values()), max(0.01, *known.values())
        _by_layer(made, left, grid, means, low=low, high=high, label="mean over pairs of experts")
        left.set_title("all modules")
        matrix = np.where(np.eye(len(similarity[most]), dtype=bool), np.nan, similarity[most])
        low, high = min(0.0, np.nanmin(matrix)), max(0.01, np.nanmax(matrix))
        text = ".2f" if len(matrix) <= 6 else ""
        image = heat_map(right, matrix, rows=range(len(matrix)), low=low, high=high, text=text)
        right.set(xlabel="expert", ylabel="expert", title=f"most alike: {most}", aspect="equal", anchor="W")
        _bar(made, image, right, label="cosine")
    return made


def _by_layer(made: Figure, axes: Any, grid: Any, values: Mapping[str, float], *, label: str, **limits: float) -> None:
    """One number per module: layers down, projections across."""
    layers = sorted({layer for rows in grid.values() for layer in rows}, key=lambda n: -1 if n is None else n)
    cells = np.array([[values.get(rows.get(layer, ""), np.nan) for rows in grid.values()] for layer in layers])
    names = ["" if layer is None else layer for layer in layers]
    image = heat_map(axes, cells, rows=names, text=".2f" if len(layers) <= 12 else "", **limits)
    axes.set_xticks(range(len(grid)), list(grid), rotation=30, ha="right", rotation_mode="anchor")
    axes.set_ylabel("layer" if None not in layers else "")
    _bar(made, image, axes, label=label)


def _height(*rows: int) -> float:
    return min(4.2, 1.3 + 0.22 * max(rows))


def _bar(made: Figure, image: Any, axes: Any, **options: Any) -> Any:
    bar = made.colorbar(image, ax=axes, **options)
    bar.outline.set_visible(False)
    return bar


def _normalised(weights: Any) -> np.ndarray:
    """[expert], sums to 1."""
    rows = np.atleast_2d(np.asarray(weights, np.float64))
    return (rows / rows.sum(axis=-1, keepdims=True)).mean(axis=0)
