"""From router logits to gates: one composition for every routing scheme, the same in JAX and PyTorch."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.routing_rule import decision


class RouterOutput(NamedTuple):
    """One router's decision for every token; all of shape [token, expert], fp32 (`kept` is boolean).

    `logits` include the temperature. `gates` are the weights g of the formula in `moe_lora_interop.config`, before
    routed_scaling_factor and expert_dropout.
    """

    logits: Tensor
    scores: Tensor
    kept: Tensor
    gates: Tensor


def route(logits: Tensor, config: MoeLoraConfig, top_k: int | None, tau: Tensor | float | None) -> RouterOutput:
    """Computes the gates.

        p     = softmax(z) | softmax(|z|) | sigmoid(z) | z | sparsemax(z)
        keep  = all | the top_k largest p (ties: the lower expert wins) | p >= tau
                with top_p and entropy_threshold more, as `moe_lora_interop.config` says it
        gates = softmax of log p over the kept     norm_topk_prob, no adaptive threshold, no sparsemax (whose p are 0)
              = p (minus tau if adaptive) where kept, else 0; divided by its sum if norm_topk_prob      otherwise

    The first form equals the second in exact arithmetic, but gives exact zeros as gradients where they are zero
    (renormalised top-1), which an optimizer like Adam would otherwise inflate. A token with nothing kept gets zeros.
    A registered routing decides all this itself.

    Args:
        logits: z, [token, expert], the temperature applied.
        config: says which scoring_func, and whether norm_topk_prob and adaptive_threshold.
        top_k: of this module, or None.
        tau: the threshold, a number or [token, 1], or None.
    """
    if config.routing_rule is not None:
        return _registered(logits, config.routing_rule, top_k)
    # |z| by selection: its derivative at 0 is 1, as jax.numpy.abs has it, where torch.abs has 0
    z = torch.where(logits >= 0, logits, -logits) if config.scoring_func == "abs_softmax" else logits
    is_softmax = "softmax" in config.scoring_func
    scores = _SCORES[config.scoring_func](z)
    if top_k is not None:
        # by z, which orders like p but does not saturate; torch.topk breaks ties in no particular order
        order = z.sort(dim=-1, descending=True, stable=True).indices
        first = torch.arange(z.shape[-1], device=z.device) < top_k
        if config.top_p is not None:
            first = first | (scores.detach().gather(-1, order).cumsum(-1) <= config.top_p)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, first.expand_as(order))
        if config.entropy_threshold is not None:
            entropy = _entropy(scores.detach() + config.entropy_eps, config.entropy_index)
            kept = kept | (entropy > config.entropy_threshold)
    else:
        kept = torch.ones_like(scores, dtype=torch.bool) if tau is None else scores >= tau
    if config.norm_topk_prob and not config.adaptive_threshold and config.scoring_func != "sparsemax":
        log_p = z if is_softmax else torch.nn.functional.logsigmoid(z)  # softmax needs no log: p ~ exp(z)
        # the lowest finite number, not -inf: a row without any kept expert must not become NaN, nor its gradient
        gates = log_p.masked_fill(~kept, torch.finfo(z.dtype).min).softmax(-1)
        gates = gates if tau is None else gates * kept
    else:
        weights = scores - tau if config.adaptive_threshold and tau is not None else scores
        gates = torch.where(kept, weights, 0.0)
        if config.norm_topk_prob:
            total = gates.sum(-1, keepdim=True)
            gates = gates / torch.where(total > 0, total, 1.0)
    return RouterOutput(logits, scores, kept, gates)


def _registered(logits: Tensor, rule: Any, top_k: int | None) -> RouterOutput:
    """What a registered routing decides. Gates of a token that keeps more than top_k are nan: whole feed-forward blocks
    run for top_k experts alone, and would leave the others out."""
    scores, gates = decision(rule, "torch", logits, top_k)
    kept = gates != 0
    if top_k is not None:
        gates = torch.where(kept.sum(-1, keepdim=True) > top_k, torch.nan, gates)
    return RouterOutput(logits, scores, kept, gates)


def sparsemax(z: Tensor) -> Tensor:
    """The probabilities nearest to z: max(z - t, 0), t such that their sum is 1 (arXiv:1602.02068); [..., expert].

    Expert i is above t if sum_j max(z_j - z_i, 0) < 1. Of any t the derivatives are those with these experts fixed.
    """
    fixed = z.detach()
    above = ~((fixed[..., None, :] - fixed[..., None]).clamp(min=0).sum(-1) >= 1)  # where z is nan, p is too
    z = z - fixed.amax(-1, keepdim=True)
    t = (torch.where(above, z, 0.0).sum(-1, keepdim=True) - 1) / above.sum(-1, keepdim=True)
    return torch.where(z <= t, 0.0, z - t)


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "abs_softmax": lambda z: z.softmax(-1),  # of |z|, which `route` gives it
    "sigmoid": torch.sigmoid,
    "identity": lambda z: z,
    "sparsemax": sparsemax,
}


def _entropy(p: Tensor, q: float) -> Tensor:
    """Tsallis' entropy of order q, or Shannon's for q = 1, divided by that of equal p: [..., 1]."""
    experts = p.shape[-1]
    if q == 1:
        return -torch.xlogy(p, p).sum(-1, keepdim=True) / math.log(experts)
    return (1 - (p**q).sum(-1, keepdim=True)) / (1 - experts ** (1 - q))
