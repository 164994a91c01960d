"""The gates against the formula of the config, written out in numpy with a loop over tokens and experts."""

import numpy as np
import pytest
import torch
from test_peft_support import COMBINATIONS, gates_by_hand

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.peft_tuner.gating import route


def thresholds(c: MoeLoraConfig, tokens: int) -> torch.Tensor | float | None:
    if not c.adaptive_threshold:
        return c.threshold
    return c.threshold * torch.rand(tokens, 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("fields", COMBINATIONS)
def test_equals_the_formula(fields):
    c = MoeLoraConfig(**fields)
    z = 2 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tau = thresholds(c, 50)
    taus = tau.numpy()[:, 0] if isinstance(tau, torch.Tensor) else [tau] * 50
    expected = np.stack([gates_by_hand(row, c, c.top_k, t) for row, t in zip(z.numpy(), taus, strict=True)])
    np.testing.assert_allclose(route(z, c, c.top_k, tau).gates.numpy(), expected, atol=1e-14)
    in_fp32 = route(z.float(), c, c.top_k, tau.float() if isinstance(tau, torch.Tensor) else tau)
    np.testing.assert_allclose(in_fp32.gates.numpy(), expected, atol=1e-6)
    assert (in_fp32.gates.numpy()[expected == 0] == 0).all()


@pytest.mark.parametrize("fields", COMBINATIONS)
def test_gradient_equals_finite_differences(fields):
    c = MoeLoraConfig(**fields)
    z = 2 * torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tau = thresholds(c, 3)
    inputs = [z.requires_grad_()] + ([tau.requires_grad_()] if isinstance(tau, torch.Tensor) else [])
    gates = lambda z, tau=tau: route(z, c, c.top_k, tau).gates  # noqa: E731
    assert torch.autograd.gradcheck(gates, inputs)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ties_go_to_the_lower_expert(k):
    c = MoeLoraConfig(num_experts=4, top_k=k)
    routing = route(torch.zeros(5, 4), c, k, None)
    assert (routing.kept == (torch.arange(4) < k)).all()
    assert torch.equal(routing.gates, (torch.arange(4) < k).float().expand(5, 4) / k)


@pytest.mark.parametrize("scoring", ["softmax", "abs_softmax", "sigmoid"])
def test_saturated_scores_do_not_tie(scoring):
    c = MoeLoraConfig(num_experts=4, top_k=1, scoring_func=scoring)
    z = torch.tensor([[300.0, 50.0, 400.0, 60.0], [-300.0, -500.0, -200.0, -400.0]])
    best = [2, 1 if scoring == "abs_softmax" else 2]
    assert route(z, c, 1, None).kept.float().argmax(-1).tolist() == best


@pytest.mark.parametrize("scoring", ["softmax", "abs_softmax", "sigmoid"])
@pytest.mark.parametrize("norm", [True, False])
def test_a_token_that_keeps_nothing_gets_zeros_and_no_nan(scoring, norm):
    c = MoeLoraConfig(num_experts=4, threshold=1.0, scoring_func=scoring, norm_topk_prob=norm)
    z = torch.randn(3, 4, requires_grad=True)
    gates = route(z, c, None, c.threshold).gates
    assert (gates == 0).all()
    gates.sum().backward()
    assert (z.grad == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_logits_stay_finite(scale):
    z = (scale * torch.tensor([[1.0, -1.0, 0.0, 0.5]])).requires_grad_()
    for fields in ({}, {"top_k": 2}, {"threshold": 0.3}, {"scoring_func": "sigmoid", "threshold": 0.3}):
        gates = route(z, MoeLoraConfig(num_experts=4, **fields), fields.get("top_k"), fields.get("threshold")).gates
        gates.square().sum().backward()
        assert gates.isfinite().all() and z.grad.isfinite().all()


def test_renormalised_top_1_has_an_exactly_zero_router_gradient():
    z = torch.randn(20, 4, requires_grad=True)
    gates = route(z, MoeLoraConfig(num_experts=4, top_k=1), 1, None).gates
    (gates * torch.randn(20, 4)).sum().backward()
    assert (z.grad == 0).all()


def test_absolute_value_has_the_derivative_of_jax_at_zero():
    z = torch.zeros(1, 4, requires_grad=True)
    gates = route(z, MoeLoraConfig(num_experts=4, scoring_func="abs_softmax"), None, None).gates
    gates[0, 0].backward()
    torch.testing.assert_close(z.grad, torch.tensor([[3.0, -1, -1, -1]]) / 16)
