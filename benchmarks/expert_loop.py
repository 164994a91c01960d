"""A mixture as most PyTorch implementations run it: a Python loop over the experts. To compare with, not to use."""

import torch
from torch import Tensor, nn


class ExpertLoopLinear(nn.Module):
    """W0 x + sum_e g_e B_e A_e x, expert by expert, on the tokens that chose it (like Mixtral)."""

    def __init__(self, base: nn.Linear, *, experts: int, rank: int, top_k: int):
        super().__init__()
        self.base, self.top_k = base, top_k
        self.router = nn.Linear(base.in_features, experts, bias=False)
        self.a = nn.ModuleList(nn.Linear(base.in_features, rank, bias=False) for _ in range(experts))
        self.b = nn.ModuleList(nn.Linear(rank, base.out_features, bias=False) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores, chosen = torch.topk(self.router(flat), self.top_k, dim=-1)
        gates = torch.softmax(scores, dim=-1)
        out = self.base(flat)
        for expert, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            tokens, slot = torch.where(chosen == expert)
            out = out.index_add(0, tokens, b(a(flat[tokens])) * gates[tokens, slot, None])
        return out.reshape(*x.shape[:-1], -1)


def add_expert_loops(model: nn.Module, *, experts: int, rank: int, top_k: int) -> None:
    """Replaces every linear layer of `model`, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, ExpertLoopLinear(child, experts=experts, rank=rank, top_k=top_k))
