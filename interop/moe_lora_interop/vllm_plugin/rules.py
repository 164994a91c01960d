"""How the gates of one module are made, as a row of numbers: what a config says, without a branch left in it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig

SCORES = ("softmax", "abs_softmax", "sigmoid", "identity", "sparsemax")
_INFINITE = float("inf")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The numbers of the formula in `moe_lora_interop.config.adapter_config`; the defaults are those of no mixture.

    Attributes:
        experts: E; 0: nothing here has a gate.
        score: place in `SCORES`.
        temperature: divides the logits.
        top_k: experts that are kept; E keeps all.
        tau: the threshold; -inf keeps all.
        adaptive: 1: tau is multiplied by the sigmoid of unit E, and subtracted.
        adaptive_bias: added to unit E.
        top_p: more experts are kept up to this sum; -inf: none.
        entropy_threshold: all experts are kept above it; inf: never.
        entropy_index: of the entropy.
        entropy_eps: of the entropy.
        renormalise: 1: gates are divided by their sum.
        factor: multiplies every gate.
    """

    experts: float = 0
    score: float = 0
    temperature: float = 1
    top_k: float = 0
    tau: float = -_INFINITE
    adaptive: float = 0
    adaptive_bias: float = 0
    top_p: float = -_INFINITE
    entropy_threshold: float = _INFINITE
    entropy_index: float = 1
    entropy_eps: float = 0
    renormalise: float = 0
    factor: float = 1

    @classmethod
    def of(cls, config: MoeLoraConfig, module: ModuleConfig, adaptive_bias: float = 0) -> "Rule":
        """That of a routed module."""
        return cls(
            experts=module.num_experts,
            score=SCORES.index(config.scoring_func),
            temperature=config.router_temperature,
            top_k=module.num_experts if module.top_k is None else module.top_k,
            tau=-_INFINITE if config.threshold is None else config.threshold,
            adaptive=config.adaptive_threshold,
            adaptive_bias=adaptive_bias,
            top_p=-_INFINITE if config.top_p is None or module.top_k is None else config.top_p,
            entropy_threshold=_INFINITE if config.entropy_threshold is None else config.entropy_threshold,
            entropy_index=config.entropy_index,
            entropy_eps=config.entropy_eps,
            renormalise=config.norm_topk_prob,
            factor=config.routed_scaling_factor,
        )

    @property
    def parts(self) -> frozenset[str]:
        """Which parts of the formula it needs, of `PARTS`."""
        needed = {
            SCORES[int(self.score)]: self.experts > 0,
            "temperature": self.temperature != 1,
            "top_k": self.top_k < self.experts,
            "threshold": self.tau > -_INFINITE,
            "adaptive": self.adaptive > 0,
            "top_p": self.top_p > -_INFINITE,
            "entropy": self.entropy_threshold < _INFINITE,
            "renormalise": self.renormalise > 0,
            "factor": self.factor != 1,
        }
        return frozenset(name for name, is_needed in needed.items() if is_needed)

    def row(self, bias: Sequence[float], units: int) -> list[float]:
        """The numbers, and the router's bias of every unit."""
        return [*(float(getattr(self, name)) for name in FIELDS), *bias, *[0.0] * (units - len(bias))]


PARTS = frozenset(
    [*SCORES, "temperature", "top_k", "threshold", "adaptive", "top_p", "entropy", "renormalise", "factor"]
)
"""Of the formula. A captured graph has all of them; where nothing is captured, an adapter runs those that it needs."""
FIELDS = tuple(field.name for field in fields(Rule))
