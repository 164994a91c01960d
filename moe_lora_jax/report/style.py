"""How the figures look: one ink, colours that the colour-blind can tell apart, and no global state of matplotlib."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

INK = "#1a1a1b"  # text and lines; the HTML page replaces it by the colour of its text, light or dark
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#8A8A8A")  # Okabe and Ito; grey for black
MARKERS = "osD^vPX"  # lines differ in more than colour
WIDTH = 10.0  # inches

_STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "figure.titlesize": 10.0,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.0,
    "svg.fonttype": "none",
    "image.cmap": "viridis",
    "image.interpolation": "none",  # one pixel of the image per cell, in SVG too
    "grid.color": INK,
    "grid.alpha": 0.2,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


@contextmanager
def figure(width: float, height: float, title: str) -> Iterator[Figure]:
    """A new figure in this style, sizes in inches. It belongs to no pyplot window and needs no display."""
    with mpl.rc_context(_STYLE):
        made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        made.suptitle(title, x=0.0, ha="left")
        yield made


def line_looks(count: int) -> list[dict[str, Any]]:
    """Colour and marker for each of so many lines."""
    return [{"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]} for i in range(count)]


def heat_map(axes: Axes, values: np.ndarray, *, rows: Sequence[Any], low: float, high: float, text: str = "") -> Any:
    """`values` [row, column] as colours; NaN is hatched. `text`: also say the numbers, in this format."""
    image = axes.imshow(values, vmin=low, vmax=high, aspect="auto")
    axes.patch.set(hatch="////", edgecolor=INK, alpha=0.3)  # shows through where there is no value
    axes.spines[:].set_visible(False)
    step = -(-len(rows) // 14)
    axes.set_yticks(range(0, len(rows), step), [str(r) for r in rows[::step]])
    step = -(-values.shape[1] // 8)
    axes.set_xticks(range(0, values.shape[1], step))
    axes.tick_params(length=0)
    if text:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = _contrast(image.get_cmap(), (value - low) / (high - low or 1.0))
                axes.text(column, row, format(value, text), ha="center", va="center", color=ink, fontsize=8)
    return image


def _contrast(colours: Colormap, place: float) -> str:
    """Black or white, whichever is easier to read on the colour (its luminance as in WCAG 2)."""
    channels = np.asarray(colours(place)[:3])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"
