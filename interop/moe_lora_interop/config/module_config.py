"""What a config says about one target module."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModuleConfig:
    """What the config says about one target module. `ranks` and `alphas` have one entry per expert; a token keeps at
    least `top_k` and at most `most_kept` experts, null being all."""

    num_experts: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    use_rslora: bool
    top_k: int | None
    most_kept: int | None
    shared_lora_A: bool

    @property
    def rank(self) -> int:
        """Size of the rank axis in memory; experts of smaller rank are zero-padded up to it."""
        return max(self.ranks)

    @property
    def scalings(self) -> tuple[float, ...]:
        """s_e = alpha_e / r_e, or alpha_e / sqrt(r_e) with use_rslora."""
        return tuple(a / (math.sqrt(r) if self.use_rslora else r) for a, r in zip(self.alphas, self.ranks, strict=True))

    @property
    def has_router(self) -> bool:
        """One expert needs no router: the module is plain LoRA."""
        return self.num_experts > 1


def one_per_expert(value: Any, experts: int) -> tuple:
    return tuple(value) if isinstance(value, list) else (value,) * experts
