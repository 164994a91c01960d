"""Experts that are whole feed-forward blocks (MixLoRA, arXiv:2404.15159): the block's code runs once, on slots.

    FFN(x) = sum_e g_e FFN_e(x), every W of FFN_e being W0 + s_e B_e A_e

The block's first layers add one delta per slot to one base product; its last layer multiplies by the gates and sums
*before* its base product, which is exact because that layer is linear. So no base product is ever computed per expert.
With top-k routing the slots are the k experts that each token chose; otherwise they are all experts, in order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lora_interop.peft_tuner.mixing import gated_sum, scaled


class Slots(NamedTuple):
    """What a block's router decided for its tokens.

    gates   [token, expert], fp32, times routed_scaling_factor
    chosen  [slot, token, expert], one 1 per slot and token; None: slot e is expert e
    lead    the axes of the block's input that are joined to `token`
    """

    gates: Tensor
    chosen: Tensor | None
    lead: torch.Size

    @classmethod
    def of(cls, gates: Tensor, top_k: int | None, lead: torch.Size) -> "Slots":
        """Slots for the k largest gates of every token, whatever their signs; of equal ones the first."""
        if top_k is None or top_k >= gates.shape[-1]:
            return cls(gates, None, lead)
        order = gates.detach().abs().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        return cls(gates, torch.nn.functional.one_hot(order.T, gates.shape[-1]).to(gates.dtype), lead)

    def flat(self, x: Tensor) -> Tensor:
        """[(slot,) *lead, size] -> [slot or 1, token, size]."""
        return x.reshape(-1, len(self.gates), x.shape[-1])

    def add_deltas(self, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scalings: tuple[float, ...]) -> Tensor:
        """base + s_e B_e A_e x, e the expert in each slot: [slot, *lead, out].

        Args:
            base: [(slot,) *lead, out].
            x: [slot or 1, token, in].
        """
        if self.chosen is None:
            hidden = scaled((x @ a.transpose(1, 2)).movedim(0, -1), scalings).movedim(-1, 0)
            delta = hidden @ b.transpose(1, 2)
        else:
            gated = self._codes(x, a) * scaled(self.chosen, scalings).to(a.dtype)[..., None]
            delta = gated.flatten(2) @ b.transpose(1, 2).flatten(0, 1)
        return base + delta.unflatten(1, self.lead).to(base.dtype)

    def mix(self, x: Tensor) -> Tensor:
        """sum_s g_s x_s: x [slot or 1, token, in] -> [*lead, in]."""
        weights = self.gates.T if self.chosen is None else (self.chosen * self.gates).sum(-1)
        slots = x.expand(len(weights), -1, -1).transpose(0, 1)  # as torch.matmul takes it without a copy; einsum copies
        return (weights.T.to(x.dtype)[:, None] @ slots)[:, 0].unflatten(0, self.lead)

    def gated_sum(self, x: Tensor, a: Tensor, b: Tensor, scalings: tuple[float, ...]) -> Tensor:
        """sum_s g_s s_e B_e A_e x_s, e the expert in slot s: x [slot or 1, token, in] -> [*lead, out]."""
        if self.chosen is None:  # slot e is expert e: no expert sees another's activations
            hidden = (x @ a.transpose(1, 2)).transpose(0, 1)
        else:
            hidden = (self._codes(x, a) * self.chosen.to(a.dtype)[..., None]).sum(0)
        return gated_sum(hidden, scaled(self.gates, scalings), b).unflatten(0, self.lead)

    @staticmethod
    def _codes(x: Tensor, a: Tensor) -> Tensor:
        """A x of every expert: [slot or 1, token, expert or 1, rank]."""
        return torch.nn.functional.linear(x, a.flatten(0, 1)).unflatten(2, a.shape[:2])
