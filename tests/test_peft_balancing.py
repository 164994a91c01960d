"""Auxiliary losses of routers that serve several layers, pooled and localized: by hand, by their authors, by JAX."""

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from test_peft_support import FIELDS, THIRD_PARTY_WARNINGS, config, input_ids, out, tiny_llama, wrapped
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import moe_lora_interop
import moe_lora_interop.peft_tuner as tuner
import moe_lora_jax as mlj
from moe_lora_interop.peft_tuner.losses import localized_balancing_loss
from moe_lora_interop.peft_tuner.router import MoeLoraLayer
from moe_lora_jax.train import losses as jax_losses
from tests.peers_data import Peer

pytestmark = THIRD_PARTY_WARNINGS
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]])
masks = pytest.mark.parametrize("mask", [None, MASK], ids=["all", "padded"])


def after_forward(name: str, **fields) -> peft.PeftModel:
    model = wrapped(name, **fields).train()
    out(model, name, grad=True)
    return model


def recorded(model) -> list[tuner.RouterOutput]:
    layers = [m for m in model.modules() if isinstance(m, MoeLoraLayer)]
    return [m.moe_lora_routing["default"] for m in layers if m.moe_lora_routing]


@masks
@pytest.mark.parametrize("name", ["ffn", "ffn_adaptive", "model", "layerwise", "embedding", "poly"])
def test_equals_the_formula_by_hand(name, mask):
    model = after_forward(name, router_aux_loss_coef=0.3, router_z_loss_coef=0.02)
    real = np.ones(14, bool) if mask is None else mask.reshape(-1).bool().numpy()
    balance, z_losses = [], []
    for routing in recorded(model):
        fields = [f.detach().double().numpy() for f in routing]
        fields = [f.reshape(len(f), -1, f.shape[-1]) for f in fields]  # [row, split or layer, expert]
        fields = [np.repeat(f, 14 // len(f), axis=0)[real] for f in fields]  # [real token, ...]
        for logits, scores, kept, gates in zip(*(f.swapaxes(0, 1) for f in fields), strict=True):
            p = (scores / scores.sum(-1, keepdims=True)).mean(0)
            f = (kept if "top_k" in FIELDS[name] else gates).mean(0)
            balance.append(p.shape[0] * (f * p).sum())
            z_losses.append((np.log(np.exp(logits).sum(-1)) ** 2).mean())
    expected = 0.3 * np.mean(balance) + 0.02 * np.mean(z_losses)
    assert model.moe_lora_aux_loss(mask).item() == pytest.approx(expected, rel=1e-5)
    assert len(recorded(model)) == {"ffn": 2, "ffn_adaptive": 2, "poly": 4}.get(name, 1)


@pytest.mark.parametrize("name", ["ffn", "layerwise", "poly"])
def test_equals_jax(tmp_path, name):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = wrapped(name, base)
    model.save_pretrained(tmp_path / "adapter")
    twin = mlj.load_adapter(mlj.load_base_model(tmp_path / "base"), tmp_path / "adapter")
    extra = {"task_ids": jnp.asarray([3, 1])} if name == "poly" else {}
    _, router = twin(jnp.asarray(input_ids()), return_router=True, **extra)
    balance = jax_losses.load_balancing_loss(router, twin.moe_lora_config, jnp.asarray(MASK))
    z = jax_losses.router_z_loss(router, jnp.asarray(MASK))
    for fields, expected in (({"router_aux_loss_coef": 1.0}, balance), ({"router_z_loss_coef": 1.0}, z)):
        ours = after_forward(name, **fields).moe_lora_aux_loss(MASK)
        assert ours.item() == pytest.approx(float(expected), rel=1e-5)


@masks
@pytest.mark.parametrize("name", ["ffn", None], ids=["ffn", "linear"])
def test_pooled_it_is_mixtral_s_over_all_layers(name, mask):
    fields = {"router_aux_loss": "mixtral", "router_aux_loss_coef": 0.1, "top_k": 2}
    if name:
        model = after_forward(name, **fields)
    else:
        model = peft.get_peft_model(tiny_llama(), config(**fields)).train()
        model(input_ids())
    logits = tuple(routing.logits for routing in recorded(model))
    theirs = load_balancing_loss_func(logits, num_experts=3, top_k=2, attention_mask=mask)
    torch.testing.assert_close(model.moe_lora_aux_loss(mask), 0.1 * theirs)
    assert len(logits) == (2 if name else 4)


def test_pooled_layerwise_routers_pool_their_layers():
    model = after_forward("layerwise", router_aux_loss="mixtral", router_aux_loss_coef=1.0)
    (routing,) = recorded(model)
    f, p = routing.gates.mean((0, 1)), routing.scores.mean((0, 1))
    torch.testing.assert_close(model.moe_lora_aux_loss(), 3 * (f * p).sum())


def localized_by_hand(gates, types, delta, real) -> float:
    """One module: gates [batch, seq, expert]."""
    batch, _, experts = gates.shape
    weighted = []
    for b in range(batch):
        for i in range(experts):
            use = sum(gates[b, t, i] for t in range(gates.shape[1]) if real[b, t])
            favoured = (types[b] == 1 and i < experts / 2) or (types[b] == 0 and i >= experts / 2)
            weighted.append(use * (1 + delta if favoured else 1 - delta))
    return np.var(weighted, ddof=1) / (np.mean(weighted) ** 2 + 1e-10)


@masks
@pytest.mark.parametrize("name", ["ffn_dense", "layerwise", "poly", "embedding"])
def test_localized_equals_the_formula_by_hand(name, mask):
    fields = {
        "router_aux_loss": "localized",
        "router_aux_loss_coef": 0.5,
        "router_aux_loss_delta": 0.2,
        "num_experts": 4,
    }
    model = after_forward(name, **fields)
    real = np.ones((2, 7)) if mask is None else mask.numpy()
    losses = []
    for routing in recorded(model):
        gates = routing.gates.detach().double().numpy()
        gates = gates.reshape(len(gates), -1, 4)
        gates = np.repeat(gates, 14 // len(gates), axis=0).reshape(2, 7, -1, 4)
        losses += [localized_by_hand(gates[:, :, q], [1, 0], 0.2, real) for q in range(gates.shape[2])]
    loss = model.moe_lora_aux_loss(mask, task_types=torch.tensor([1, 0]))
    assert loss.item() == pytest.approx(0.5 * np.mean(losses), rel=1e-4)
    loss.backward()
    routers = [m for m in model.modules() if isinstance(m, MoeLoraLayer)]
    assert all(p.grad.abs().max() > 0 for m in routers for p in m.router_parameters("default") if p.ndim == 2)


def test_localized_is_loramoes_own():
    peer = Peer("loramoe/adapter")
    adapter, reference = moe_lora_interop.read(peer.directory), peer.reference
    router = torch.tensor(adapter.tensors["model.layers.1.mlp.down_proj", "router"])
    gates = (torch.tensor(reference["blc_input"]) @ router.T).softmax(-1).flatten(0, 1)
    config = adapter.config
    ours = localized_balancing_loss(gates, torch.tensor(reference["blc_task_types"]), config.router_aux_loss_delta)
    assert config.router_aux_loss == "localized" and config.router_aux_loss_delta == 0.25
    assert config.router_aux_loss_coef * ours.item() == pytest.approx(float(reference["blc_loss"]), rel=1e-5)


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (None, r"pass task_types=\[batch\], 0 or 1"),
        (torch.tensor([0, 2]), r"task_types: found \[0, 2\], expected a list \[batch\] of 0 and 1"),
        (torch.tensor([0, 1, 1, 0]), "task_types has 4 entries, expected one for each sample"),
    ],
)
def test_localized_needs_task_types(types, message):
    model = after_forward("ffn", router_aux_loss="localized", router_aux_loss_coef=1.0, num_experts=4)
    with pytest.raises(ValueError, match=message):
        model.moe_lora_aux_loss(task_types=types)


def test_masks_of_another_batch():
    for name, seen in (("ffn", "14 tokens"), ("poly", "2 sequences")):
        with pytest.raises(ValueError, match=f"for each of the {seen} that this router saw"):
            after_forward(name, router_aux_loss_coef=1.0).moe_lora_aux_loss(torch.ones(3, 7))


def test_reentrant_checkpointing_is_refused_here_too():
    model = wrapped("ffn", router_aux_loss_coef=1.0).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    out(model, "ffn", grad=True)
    with pytest.raises(RuntimeError, match="the forward ran without gradients.*'use_reentrant': False"):
        model.moe_lora_aux_loss()
