"""Gates of many adapters in one batch, as one function of tables: nothing branches on what is loaded.

The same formula as `moe_lora_interop.peft_tuner.gating`; there a config chooses between its parts, here a table's row
does, for every token its own. So one captured CUDA graph, or one compiled program, serves whatever is loaded later.
"""

from collections.abc import Set

import torch
from torch import Tensor

from moe_lora_interop.vllm_plugin.rules import FIELDS, PARTS, SCORES

_LOWEST = torch.finfo(torch.float32).min


def gates(units: Tensor, rules: Tensor, parts: Set[str] = PARTS) -> Tensor:
    """routed_scaling_factor g of every expert; 0 where a token's adapter has no such expert.

    Of two experts with equal logits the lower is the larger, as a stable sort has it. Ranks are counted, in
    E x E comparisons, and not sorted.

    Args:
        units: the router's outputs without bias, fp32 [..., unit]: of experts 0 to E - 1, then of a learned threshold.
        rules: [..., field and unit], as `Rule.row` makes them; of more units than there are, the first.
        parts: those of the formula that some row may need (`Rule.parts`); others are left out, which changes no gate.

    Returns:
        fp32 [..., unit].
    """
    rule = dict(zip(FIELDS, rules[..., : len(FIELDS), None].unbind(-2), strict=True))
    unit = torch.arange(units.shape[-1], device=units.device)
    units = units + rules[..., len(FIELDS) : len(FIELDS) + len(unit)]
    is_expert = unit < rule["experts"]
    z = units / rule["temperature"] if "temperature" in parts else units
    if "abs_softmax" in parts:
        z = torch.where(rule["score"] == SCORES.index("abs_softmax"), z.abs(), z)
    z = torch.where(is_expert, z, _LOWEST)
    p = _scores(z, is_expert, rule["score"], parts)

    kept = is_expert
    if parts & {"top_k", "top_p"}:
        ahead = z[..., None, :] - z[..., None]  # [..., expert, other]
        is_larger = torch.where(unit < unit[:, None], ahead >= 0, ahead > 0)
        first = is_larger.sum(-1) < rule["top_k"]
        if "top_p" in parts:
            first = first | (p + torch.where(is_larger, p[..., None, :], 0.0).sum(-1) <= rule["top_p"])
        if "entropy" in parts:
            first = first | _is_uncertain(p, is_expert, rule)
        kept = kept & first
    tau = rule["tau"]
    if "adaptive" in parts:
        place = rule["experts"].long().clamp(max=len(unit) - 1).expand(*units.shape[:-1], 1)
        is_learned = rule["adaptive"] > 0
        tau = torch.where(is_learned, tau * (units.gather(-1, place) + rule["adaptive_bias"]).sigmoid(), tau)
    if "threshold" in parts:
        kept = kept & (p >= tau)
    if "adaptive" in parts:
        p = p - torch.where(is_learned, tau, 0.0)
    g = torch.where(kept, p, 0.0)
    if "renormalise" in parts:
        total = g.sum(-1, keepdim=True)
        g = g / torch.where((rule["renormalise"] > 0) & (total > 0), total, 1.0)
    return g * rule["factor"] if "factor" in parts else g


def _scores(z: Tensor, is_expert: Tensor, score: Tensor, parts: Set[str]) -> Tensor:
    """p of the experts; anything for other units."""
    p = z.softmax(-1)
    if "sigmoid" in parts:
        p = torch.where(score == SCORES.index("sigmoid"), z.sigmoid(), p)
    if "identity" in parts:
        p = torch.where(score == SCORES.index("identity"), z, p)
    if "sparsemax" in parts:
        above = (z[..., None, :] - z[..., None]).clamp(min=0).sum(-1) < 1
        below_top = z - z.amax(-1, keepdim=True)
        t = (torch.where(above, below_top, 0.0).sum(-1, keepdim=True) - 1) / above.sum(-1, keepdim=True)
        p = torch.where(score == SCORES.index("sparsemax"), (below_top - t).clamp(min=0), p)
    return torch.where(is_expert, p, 0.0) if "top_p" in parts else p


def _is_uncertain(p: Tensor, is_expert: Tensor, rule: dict[str, Tensor]) -> Tensor:
    """Whether all experts are kept, by the entropy of p: [..., 1]."""
    p = torch.where(is_expert, p + rule["entropy_eps"], 0.0)
    q, experts = rule["entropy_index"], rule["experts"].clamp(min=2)
    other = torch.where(q == 1, 2.0, q)  # Tsallis' formula has a hole at 1, where Shannon's is
    powers = torch.where(is_expert, p.clamp(min=0) ** other, 0.0)
    tsallis = (1 - powers.sum(-1, keepdim=True)) / (1 - experts ** (1 - other))
    shannon = -torch.xlogy(p, p).sum(-1, keepdim=True) / experts.log()
    return torch.where(q == 1, shannon, tsallis) > rule["entropy_threshold"]
