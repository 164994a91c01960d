"""From router logits to gates: one composition for every routing scheme, the same in JAX and PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lora_interop.config.adapter_config import MoeLoraConfig


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

        p     = softmax(z) | softmax(|z|) | sigmoid(z) | z
        keep  = all | the top_k largest p (ties: the lower expert wins) | p >= tau
        gates = softmax of z (or |z|) over the kept logits     softmax scores, norm_topk_prob, no adaptive threshold
              = p (minus tau if adaptive) where kept, else 0; divided by its sum if norm_topk_prob      otherwise

    The first form equals the second in exact arithmetic, but gives exact zeros as gradients where they are zero
    (renormalised top-1), which an optimizer like Adam would otherwise inflate. A token with nothing kept gets zeros.

    Args:
        logits: z, [token, expert], the temperature applied.
        config: says which scoring_func, and whether norm_topk_prob and adaptive_threshold.
        top_k: of this module, or None.
        tau: the threshold, a number or [token, 1], or None.
    """
    # |z| by selection: its derivative at 0 is 1, as jax.numpy.abs has it, where torch.abs has 0
    z = torch.where(logits >= 0, logits, -logits) if config.scoring_func == "abs_softmax" else logits
    is_softmax = "softmax" in config.scoring_func
    scores = z.softmax(-1) if is_softmax else z if config.scoring_func == "identity" else z.sigmoid()
    if top_k is not None:
        # by z, which orders like p but does not saturate; torch.topk breaks ties in no particular order
        order = z.sort(dim=-1, descending=True, stable=True).indices
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :top_k], True)
    else:
        kept = torch.ones_like(scores, dtype=torch.bool) if tau is None else scores >= tau
    if is_softmax and config.norm_topk_prob and not config.adaptive_threshold:
        # the lowest finite number, not -inf: a row without any kept expert must not become NaN, nor its gradient
        gates = z.masked_fill(~kept, torch.finfo(z.dtype).min).softmax(-1)
        gates = gates if tau is None else gates * kept
    else:
        weights = scores - tau if config.adaptive_threshold and tau is not None else scores
        gates = torch.where(kept, weights, 0.0)
        if config.norm_topk_prob:
            total = gates.sum(-1, keepdim=True)
            gates = gates / torch.where(total > 0, total, 1.0)
    return RouterOutput(logits, scores, kept, gates)
