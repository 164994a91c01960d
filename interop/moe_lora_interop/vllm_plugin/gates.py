"""Gates of many adapters in one batch, as one function of tables: nothing branches on what is loaded.

The same formula as `moe_lora_interop.peft_tuner.gating`; there a config chooses between its parts, here a table's row
does, for every token its own. So one captured CUDA graph, or one compiled program, serves whatever is loaded later.
"""

import torch
from torch import Tensor

from moe_lora_interop.vllm_plugin.rules import FIELDS, SCORES

_LOWEST = torch.finfo(torch.float32).min


def gates(units: Tensor, rules: Tensor) -> Tensor:
    """routed_scaling_factor g of every expert; 0 where a token's adapter has no such expert.

    Of two experts with equal logits the lower is the larger, as a stable sort has it. Ranks are counted, not sorted:
    E x E comparisons, which a compiler fuses with the rest.

    Args:
        units: the router's outputs without bias, fp32 [..., unit]: of experts 0 to E - 1, then of a learned threshold.
        rules: [..., field and unit], as `Rule.row` makes them.

    Returns:
        fp32 [..., unit].
    """
    rule = dict(zip(FIELDS, rules[..., : len(FIELDS), None].unbind(-2), strict=True))
    unit = torch.arange(units.shape[-1], device=units.device)
    units = units + rules[..., len(FIELDS) :]
    is_expert = unit < rule["experts"]
    z = units / rule["temperature"]
    z = torch.where(rule["score"] == SCORES.index("abs_softmax"), z.abs(), z)
    z = torch.where(is_expert, z, _LOWEST)

    ahead = z[..., None, :] - z[..., None]  # [..., expert, other]
    is_larger = (ahead > 0) | ((ahead == 0) & (unit < unit[:, None]))
    rank = is_larger.sum(-1)
    p = _scores(z, ahead, is_expert, rule["score"])

    up_to = p + torch.where(is_larger, p[..., None, :], 0.0).sum(-1)
    kept = (rank < rule["top_k"]) | (up_to <= rule["top_p"]) | _uncertain(p, is_expert, rule)
    place = rule["experts"].long().clamp(max=len(unit) - 1)
    learned = (units.gather(-1, place) + rule["adaptive_bias"]).sigmoid()
    is_learned = rule["adaptive"] > 0
    tau = torch.where(is_learned, rule["tau"] * learned, rule["tau"])
    kept = kept & is_expert & (p >= tau)

    g = torch.where(kept, p - torch.where(is_learned, tau, 0.0), 0.0)
    total = g.sum(-1, keepdim=True)
    return g / torch.where((rule["renormalise"] > 0) & (total > 0), total, 1.0) * rule["factor"]


def _scores(z: Tensor, ahead: Tensor, is_expert: Tensor, score: Tensor) -> Tensor:
    """p of the experts, 0 for other units."""
    above = ahead.clamp(min=0).sum(-1) < 1
    below_top = z - z.amax(-1, keepdim=True)
    t = (torch.where(above, below_top, 0.0).sum(-1, keepdim=True) - 1) / above.sum(-1, keepdim=True)
    sparsemax = (below_top - t).clamp(min=0)
    p = torch.where(score == SCORES.index("sigmoid"), z.sigmoid(), z.softmax(-1))
    p = torch.where(score == SCORES.index("identity"), z, p)
    p = torch.where(score == SCORES.index("sparsemax"), sparsemax, p)
    return torch.where(is_expert, p, 0.0)


def _uncertain(p: Tensor, is_expert: Tensor, rule: dict[str, Tensor]) -> Tensor:
    """Whether all experts are kept, by the entropy of p: [..., 1]."""
    p = torch.where(is_expert, p + rule["entropy_eps"], 0.0)
    q, experts = rule["entropy_index"], rule["experts"].clamp(min=2)
    other = torch.where(q == 1, 2.0, q)  # Tsallis' formula has a hole at 1, where Shannon's is
    powers = torch.where(is_expert, p.clamp(min=0) ** other, 0.0)
    tsallis = (1 - powers.sum(-1, keepdim=True)) / (1 - experts ** (1 - other))
    shannon = -torch.xlogy(p, p).sum(-1, keepdim=True) / experts.log()
    return torch.where(q == 1, shannon, tsallis) > rule["entropy_threshold"]
