"""What is summed over the steps between two lines of the metrics."""

import time
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from moe_lora_jax.train.step import StepMetrics


@dataclass
class Window:
    """Sums since the last logged step."""

    started: float = field(default_factory=time.perf_counter)
    tokens: float = 0.0
    router: dict[str, Any] = field(default_factory=dict)

    def add(self, metrics: StepMetrics) -> None:
        self.tokens += float(metrics.tokens)
        self.router = {
            module: sums if module not in self.router else jax.tree.map(np.add, self.router[module], sums)
            for module, sums in metrics.router.items()
        }

    @property
    def speed(self) -> float:
        return self.tokens / max(time.perf_counter() - self.started, 1e-9)
