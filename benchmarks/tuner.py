"""Goal 5: one layer forward and backward in eager PyTorch: the PEFT tuner against PEFT's LoRA of rank E*r, and a loop.

The loop is what most published mixtures do: one pair of small products per expert, weighted and added up.
"""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layer import SHAPES
from benchmarks.measure import Row, interleaved
from benchmarks.table import alone, ratio_row
from moe_lora_interop.peft_tuner import MoeLoraConfig


class LoopOverExperts(nn.Module):
    """The function of a `MOE_LORA` layer with softmax and top-k routing, one expert after the other."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        module = fused.moe_lora_module_config["default"]
        self.base_layer, self.top_k, self.scalings = fused.base_layer, module.top_k, module.scalings
        self.router = nn.Parameter(fused.moe_lora_router["default"].weight.detach().clone())
        self.lora_a = nn.ParameterList(a.clone() for a in fused.moe_lora_A["default"].detach())
        self.lora_b = nn.ParameterList(b.clone() for b in fused.moe_lora_B["default"].detach())

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.router)
        largest, chosen = logits.topk(self.top_k)
        gates = torch.zeros_like(logits).scatter(1, chosen, largest.softmax(-1))
        result = self.base_layer(x)
        for e, (a, b) in enumerate(zip(self.lora_a, self.lora_b, strict=True)):
            result = result + gates[:, e, None] * F.linear(F.linear(x, a), b) * self.scalings[e]
        return result


def adapted(d: int, config: peft.PeftConfig) -> Any:
    """A linear layer as PEFT wraps it for this config."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d, d, bias=False))
    return peft.get_peft_model(model, config).base_model.model[0].train()  # type: ignore[arg-type]


def gradients(layer: nn.Module, x: Tensor, cotangent: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, and the gradients for x and the adapter."""
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), wanted, cotangent)


def rows(quick: bool) -> Iterator[Row]:
    for tokens, d, experts, r, k in [(16, 32, 4, 2, 2)] if quick else SHAPES:
        common: dict[str, Any] = {"target_modules": ["0"], "init_lora_weights": False}
        fused = adapted(d, MoeLoraConfig(r=r, num_experts=experts, top_k=k, **common))
        lora = adapted(d, peft.LoraConfig(r=experts * r, **common))
        loop = LoopOverExperts(fused)
        x, cotangent = torch.randn(tokens, d, requires_grad=True), torch.randn(tokens, d)
        torch.testing.assert_close(loop(x), fused(x), rtol=1e-4, atol=1e-4)
        fused_step, lora_step, loop_step = (gradients(layer, x, cotangent) for layer in (fused, lora, loop))
        cost = interleaved({"fused": fused_step, "lora": lora_step}, "lora", rounds=3 if quick else 60)["fused"]
        gain = interleaved({"loop": loop_step, "fused": fused_step}, "fused", rounds=3 if quick else 10)["loop"]
        note = f"{tokens} tokens, d {d}, E {experts}, r {r}, top {k}; {cost.seconds * 1e3:.1f} ms"
        yield ratio_row("5. PEFT tuner, layer <= 1.10x of PEFT's LoRA of rank E*r", cost, cost.median <= 1.10, note)
        yield ratio_row("5. PEFT tuner, a loop over experts >= 1.7x as slow", gain, gain.median >= 1.7, note)


if __name__ == "__main__":
    alone(rows)
