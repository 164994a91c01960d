"""The formulas of the auxiliary losses on routers' decisions; `losses` collects these.

A decision's fields are [row, expert], or [row, split, expert]: losses of splits are averaged. Rows are tokens, or, for
a router that reads task ids, sequences, which count as many times as they have tokens. `real` [row] is that count: 1 or
0 for a token, or None if all count equally.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lora_interop.peft_tuner.gating import RouterOutput


def use(routing: RouterOutput, counts_kept: bool, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How experts are used, f and P, each [(split,) expert].

    P_e = mean_t of softmax(z)_e, softmax(|z|)_e or sigmoid(z)_e / sum_e sigmoid(z)_e
    f_e = (tokens that keep expert e) / (tokens)    if counts_kept, which is for top-k; sum_e f_e = k
        = mean_t g_e                                otherwise, differentiable
    """
    probabilities = routing.scores / routing.scores.sum(-1, keepdim=True)
    share = routing.kept.to(probabilities.dtype) if counts_kept else routing.gates
    return _token_mean(share, real), _token_mean(probabilities, real)


def load_balancing_loss(routing: RouterOutput, counts_kept: bool, real: Tensor | None = None) -> Tensor:
    """L = E sum_e f_e P_e of one module (Switch Transformers, arXiv:2101.03961), f and P as in `use`."""
    return _balance(*use(routing, counts_kept, real))


def pooled_balancing_loss(uses: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """L = E sum_e (mean_m f_e) (mean_m P_e) over the modules m: with top-k, transformers' load_balancing_loss_func of
    Mixtral over several layers.

    Args:
        uses: f and P of every module, from `use`.
    """
    shares, probabilities = zip(*uses, strict=True)
    return _balance(torch.stack(shares).mean(0), torch.stack(probabilities).mean(0))


def localized_balancing_loss(
    gates: Tensor, task_types: Tensor, delta: float = 0.0, real: Tensor | None = None
) -> Tensor:
    """LoRAMoE's balancing constraint of one module (arXiv:2312.09979): halves of the experts are for types of tasks.

        Q_bi = sum over the real tokens t of sample b of g_bti
        Z_bi = 1 + delta    type_b = 1 and i < E/2, or type_b = 0 and i >= E/2
             = 1 - delta    otherwise
        L    = var(Q Z) / (mean(Q Z)^2 + 1e-10)        unbiased variance over all samples and experts

    Args:
        gates: [row, (split,) expert] of the batch in its order; expert is even.
        task_types: [batch], 0 or 1.
    """
    weighted = gates if real is None else gates * real.reshape(-1, *[1] * (gates.ndim - 1))
    use_of = weighted.reshape(len(task_types), -1, *gates.shape[1:]).sum(1)  # [batch, (split,) expert]
    first_half = torch.arange(gates.shape[-1], device=gates.device) < gates.shape[-1] // 2
    favoured = first_half == (task_types.to(gates.device) == 1)[:, None]
    z = torch.where(favoured, 1 + delta, 1 - delta).reshape(len(task_types), *[1] * (gates.ndim - 2), -1)
    values = (use_of * z).movedim(0, -2).flatten(-2)  # [(split,) batch x expert]
    return (values.var(-1) / (values.mean(-1).square() + 1e-10)).mean()


def z_loss(routing: RouterOutput, real: Tensor | None = None) -> Tensor:
    """Z = mean_t logsumexp_e(z)^2 of one module (ST-MoE, arXiv:2202.08906)."""
    return _token_mean(routing.logits.logsumexp(-1).square(), real).mean()


def _balance(share: Tensor, probability: Tensor) -> Tensor:
    return probability.shape[-1] * (share * probability).sum(-1).mean()


def _token_mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean over the first axis of the real tokens, zero without any; by weights, because a selection of tokens would
    have a size that an accelerator and a compiler do not know beforehand."""
    if real is None:
        return values.sum(0) / max(len(values), 1)
    return torch.tensordot(real, values, dims=1) / real.sum().clamp(min=1)
