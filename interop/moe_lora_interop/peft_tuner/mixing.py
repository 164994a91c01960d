"""The products that carry all experts of a layer at once."""

import torch
from torch import Tensor


def gated_sum(hidden: Tensor, weights: Tensor, b: Tensor) -> Tensor:
    """sum_e weights_e B_e hidden_e, as one product over the joined (expert rank) axis.

    Args:
        hidden: A x, [token, expert, rank]; the expert axis is 1 when A is shared.
        weights: gate times scaling, [token, expert].
        b: [expert, out, rank].

    Returns:
        [token, out]; no [token, expert, out] tensor ever exists.
    """
    return (hidden * weights.to(hidden.dtype)[..., None]).flatten(1) @ b.transpose(1, 2).flatten(0, 1)


def mixed_factors(x: Tensor, gates: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """B A x with mixed factors (Poly, arXiv:2202.13914; MHR, arXiv:2211.03831).

    A = [sum_e g_qe A_e,q for q in splits] over the input, B likewise over the output: the input of A and the output of
    B are cut into parts, each mixed by gates of its own. PEFT's Poly draws the gates from a relaxed Bernoulli in
    training; here they are the scores themselves, in training too.

    Args:
        x: [token, in].
        gates: [token, split, expert].
        a: [expert, rank, in].
        b: [expert, out, rank].

    Returns:
        [token, out]. One batched product over the splits for each factor; no mixed matrix per token ever exists.
    """
    splits = gates.shape[1]
    gates = gates.to(a.dtype)
    hidden = torch.einsum("tqi,erqi->tqer", x.unflatten(1, (splits, -1)), a.unflatten(2, (splits, -1)))
    code = torch.einsum("tqer,tqe->tr", hidden, gates)
    gated = gates[..., None] * code[:, None, None, :]
    return torch.einsum("tqer,eqor->tqo", gated, b.unflatten(1, (splits, -1))).flatten(1)


def scaled(gates: Tensor, scalings: tuple[float, ...]) -> Tensor:
    """g_e s_e; a plain number when all s_e are equal, which spares a copy to the device in every forward."""
    return gates * (scalings[0] if len(set(scalings)) == 1 else gates.new_tensor(scalings))
