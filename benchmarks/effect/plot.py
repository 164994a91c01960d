"""The comparison as a picture: accuracy with its interval, and accuracy against forgetting."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.effect.bootstrap import interval, mean, test_values
from benchmarks.effect.table import finished

PICTURE = Path(__file__).parent / "results.png"


def write_picture(rows: Sequence[Mapping[str, Any]], file: Path = PICTURE) -> None:
    """Writes a PNG. Left: test accuracy and 95 % intervals. Right: the change of loss on general text against it."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    methods = finished(rows)
    base = next(row for row in rows if row["method"] == "base")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.45 * len(methods) + 2), layout="constrained")
    for place, (method, of_method) in enumerate(methods.items()):
        values = test_values(of_method, "correct")
        low, high = interval(values)
        left.plot([100 * low, 100 * high], [place, place], color="tab:blue")
        left.plot(100 * mean(values), place, "o", color="tab:blue")
        forgotten = np.mean([np.mean(list(r["general_loss"].values())) for r in of_method])
        forgotten -= np.mean(list(base["general_loss"].values()))
        right.plot(100 * mean(values), forgotten, "o", color="tab:blue")
        right.annotate(method, (100 * mean(values), forgotten), xytext=(4, 4), textcoords="offset points", fontsize=8)
    left.set(yticks=range(len(methods)), yticklabels=list(methods), xlabel="test accuracy, %, and 95 % interval")
    left.invert_yaxis()
    right.set(xlabel="test accuracy, %", ylabel="change of loss on general text, nats")
    figure.savefig(file, dpi=110)
    plt.close(figure)
