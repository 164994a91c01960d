"""The auxiliary losses against transformers', the formula by hand, and their way through checkpointing and padding."""

import numpy as np
import peft
import pytest
import torch
from test_peft_support import THIRD_PARTY_WARNINGS, config, input_ids, tiny_llama
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import moe_lora_interop.peft_tuner as tuner
from moe_lora_interop.peft_tuner.layer import MoeLoraLayer
from moe_lora_interop.peft_tuner.losses import load_balancing_loss, z_loss

pytestmark = THIRD_PARTY_WARNINGS

MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]])


def model_after_forward(train: bool = True, **fields) -> peft.PeftModel:
    fields = {"router_aux_loss_coef": 0.1} | fields
    model = peft.get_peft_model(tiny_llama(), config(**fields))
    for name, parameter in model.named_parameters():
        if "router" in name:
            torch.nn.init.normal_(parameter)
    model.train(train)
    model(input_ids())
    return model


def routed(model) -> list[MoeLoraLayer]:
    return [m for m in model.modules() if isinstance(m, MoeLoraLayer) and "default" in m.moe_lora_router]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_one_top_k_module_equals_mixtral_s(k, mask):
    model = model_after_forward(top_k=k, target_modules=r".*layers\.0.*q_proj")
    (layer,) = routed(model)
    z = layer.moe_lora_routing["default"].logits
    theirs = load_balancing_loss_func((z,), num_experts=3, top_k=k, attention_mask=mask)
    torch.testing.assert_close(model.moe_lora_aux_loss(mask), 0.1 * theirs)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])
@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 2},
        {"scoring_func": "sigmoid"},
        {"scoring_func": "abs_softmax", "threshold": 0.3},
        {"top_k": 2, "scoring_func": "sigmoid", "norm_topk_prob": False, "router_temperature": 0.5},
        {"threshold": 0.4, "adaptive_threshold": True, "routed_scaling_factor": 3.0, "expert_dropout": 0.5},
        {"num_experts_pattern": {"down_proj": 1}},
        {"num_experts_pattern": {"down_proj": 2}, "top_k_pattern": {"q_proj": 1}},
    ],
    ids=["top_2", "sigmoid", "abs_threshold", "sigmoid_top_2", "adaptive", "one_plain", "patterns"],
)
@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_equals_the_formula_by_hand(fields, mask):
    model = model_after_forward(router_aux_loss_coef=0.3, router_z_loss_coef=0.02, **fields)
    balance, z_losses = [], []
    for layer in routed(model):
        routing = layer.moe_lora_routing["default"]
        real = np.ones(14, bool) if mask is None else mask.numpy().reshape(-1) == 1
        z, g = routing.logits.detach().double().numpy()[real], routing.gates.detach().double().numpy()[real]
        score = np.abs(z) if fields.get("scoring_func") == "abs_softmax" else z
        p = 1 / (1 + np.exp(-z)) if fields.get("scoring_func") == "sigmoid" else np.exp(score)
        p = p / p.sum(-1, keepdims=True)
        experts, top_k = p.shape[1], layer.moe_lora_module_config["default"].top_k
        f = np.zeros(experts)
        for t in range(len(z)):
            for e in range(experts):
                f[e] += (g[t, e] if top_k is None else e in np.argsort(-p[t])[:top_k]) / len(z)
        balance.append(experts * sum(f[e] * p[:, e].mean() for e in range(experts)))
        z_losses.append(np.mean(np.log(np.exp(z).sum(-1)) ** 2))
    expected = 0.3 * np.mean(balance) + 0.02 * np.mean(z_losses)
    assert model.moe_lora_aux_loss(mask).item() == pytest.approx(expected, rel=1e-5)


def test_a_model_without_any_coefficient_or_router_has_no_loss():
    for fields in ({"router_aux_loss_coef": 0.0}, {"num_experts": 1}):
        assert model_after_forward(**fields).moe_lora_aux_loss() == 0


def test_a_batch_of_padding_alone_has_no_loss():
    assert model_after_forward(top_k=2, router_z_loss_coef=1.0).moe_lora_aux_loss(torch.zeros(2, 7)) == 0


def test_gradient_reaches_the_routers_and_only_them():
    model = model_after_forward(top_k=2)
    model.moe_lora_aux_loss(MASK).backward()
    last = model.base_model.model.model.layers[1].mlp.down_proj
    assert last.moe_lora_router["default"].weight.grad.abs().max() > 0
    assert last.moe_lora_B["default"].grad is None


def test_dense_routing_differentiates_through_the_gates_too():
    (layer, *_) = routed(model_after_forward())
    routing = layer.moe_lora_routing["default"]
    whole = torch.autograd.grad(load_balancing_loss(routing, counts_kept=False), routing.logits, retain_graph=True)[0]
    detached = routing._replace(gates=routing.gates.detach())
    part = torch.autograd.grad(load_balancing_loss(detached, counts_kept=False), routing.logits)[0]
    torch.testing.assert_close(whole, 2 * part)


def test_z_loss_reads_the_logits_after_the_temperature():
    (layer, *_) = routed(model_after_forward(router_temperature=4.0))
    routing = layer.moe_lora_routing["default"]
    torch.testing.assert_close(z_loss(routing), routing.logits.logsumexp(-1).pow(2).mean())


def test_several_active_adapters_add_up():
    model = model_after_forward(top_k=2)
    one = model.moe_lora_aux_loss()
    model.add_adapter("second", config(num_experts=2, router_z_loss_coef=0.5))
    model.base_model.set_adapter(["default", "second"])
    model.train()
    model(input_ids())
    assert model.moe_lora_aux_loss() > one
    model.set_adapter("second")
    model(input_ids())
    assert model.moe_lora_aux_loss() > 0
    with model.disable_adapter():
        model(input_ids())
        assert model.moe_lora_aux_loss() == 0


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_non_reentrant_checkpointing_gives_the_same_gradients(coefficient):
    gradients = []
    for checkpoint in (False, True):
        model = peft.get_peft_model(tiny_llama(), config(top_k=2, router_aux_loss_coef=coefficient))
        torch.manual_seed(0)
        if checkpoint:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss = model(input_ids(), labels=input_ids()).loss + model.moe_lora_aux_loss()
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_works_on_a_model_that_is_no_peft_model():
    model = peft.inject_adapter_in_model(config(router_aux_loss_coef=0.1, top_k=2), tiny_llama()).train()
    model(input_ids())
    assert tuner.moe_lora_aux_loss(model, MASK) > 0


def test_refused_after_an_evaluation():
    model = model_after_forward(train=False)
    with pytest.raises(RuntimeError, match="no routing to compute a loss from; run a forward in training mode first"):
        model.moe_lora_aux_loss()


def test_refused_with_a_mask_of_another_size():
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 6\], expected \[batch, seq\].*14 tokens"):
        model_after_forward().moe_lora_aux_loss(MASK[:, 1:])


def test_refused_after_reentrant_checkpointing_which_would_not_train_the_router():
    model = peft.get_peft_model(tiny_llama(), config(router_aux_loss_coef=0.1)).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model(input_ids())
    with pytest.raises(RuntimeError, match="the forward ran without gradients.*'use_reentrant': False"):
        model.moe_lora_aux_loss()
    with torch.no_grad():
        assert model.moe_lora_aux_loss() > 0
