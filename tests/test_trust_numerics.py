"""Extreme numbers and sizes, in JAX and in PyTorch, against the formula in float64.

What single rules do with ties, extreme logits and unequal ranks is in test_gating, test_peft_gating, test_layers and
test_peft_layer; here both frameworks get the same hostile input.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import moe_lora_interop
import moe_lora_interop.peft_tuner as tuner
import moe_lora_jax as mlj
from moe_lora_interop import ConfigError
from moe_lora_interop.export.task_gates import compute_gates
from moe_lora_interop.peft_tuner.gating import route as torch_route
from moe_lora_interop.peft_tuner.losses import z_loss as torch_z_loss
from moe_lora_jax.layers.gating import Gating, RouterOutput, route
from moe_lora_jax.layers.router import RouterRecord
from moe_lora_jax.train.losses import load_balancing_loss, router_z_loss

E, IN, OUT = 4, 6, 5
LOGITS = {
    "1e4": [1e4, -1e4, 9999.0, 0.0],
    "largest": [3e38, -3e38, 3e38, 0.0],
    "smallest": [2e-38, -2e-38, 0.0, 3e-38],  # of normal numbers: XLA takes smaller ones for zero
    "one masked": [0.0, 1.0, -np.inf, 2.0],
    "all but one masked": [-np.inf, -np.inf, 0.5, -np.inf],
    "equal": [7.0] * 4,
}
RULES = {
    "dense": {},
    "top 1": {"top_k": 1},
    "top 2": {"top_k": 2},
    "top 2 as they are": {"top_k": 2, "norm_topk_prob": False},
    "top E": {"top_k": 4},
    "threshold": {"threshold": 0.3},
    "sigmoid": {"scoring_func": "sigmoid"},
    "sigmoid, top 2": {"scoring_func": "sigmoid", "top_k": 2},
}


def config_of(**fields):
    return mlj.MoeLoraConfig(**{"r": 2, "num_experts": E, "target_modules": ["proj"], **fields})


@pytest.mark.parametrize("rule", RULES)
def test_extreme_logits_in_both_frameworks(rule, tally):
    config = config_of(**RULES[rule])
    sizes = config.for_module("proj")
    for z in LOGITS.values():
        z = np.asarray([z], np.float32)
        expected = compute_gates(z.astype(np.float64), config, config.top_k)
        found = route(jnp.asarray(z), Gating.of(config, sizes), config.threshold).gates
        torch_found = torch_route(torch.from_numpy(z), config, config.top_k, config.threshold).gates
        for gates in (np.asarray(found), torch_found.numpy()):
            np.testing.assert_allclose(gates, expected, atol=1e-6)
    tally("numerics", tried=2 * len(LOGITS), lost=0)


@pytest.mark.parametrize("top_k", [None, 2])
def test_sigmoids_that_are_all_too_small_for_a_float_keep_their_ratios(top_k):
    z = np.array([[-1000.0, -1001, -1003, -5000]], np.float32)
    kept = np.where(np.arange(E) < (top_k or E), z[0].astype(np.float64), -np.inf)
    expected = [np.exp(kept - kept[0]) / np.exp(kept - kept[0]).sum()]  # sigmoid(z) = exp(z) (1 - exp(z) + ...)
    config = config_of(scoring_func="sigmoid", top_k=top_k)
    given = torch.from_numpy(z).requires_grad_()
    in_torch = torch_route(given, config, top_k, None).gates
    in_jax = route(jnp.asarray(z), Gating.of(config, config.for_module("proj"))).gates
    for gates in (in_jax, in_torch.detach(), compute_gates(z.astype(np.float64), config, top_k)):
        np.testing.assert_allclose(gates, expected, rtol=1e-5)
    in_torch[0, 0].backward()
    assert given.grad[0, :2].abs().min() > 0.1


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_extreme_finite_logits_are_finite(rule, tally):
    config = config_of(**RULES[rule])
    gating = Gating.of(config, config.for_module("proj"))
    finite = [z for z in LOGITS.values() if np.isfinite(z).all()]
    for z in finite:
        weights = jnp.arange(1.0, 5.0)
        gradient = jax.grad(lambda x, w=weights: (route(x, gating, config.threshold).gates * w).sum())(jnp.asarray([z]))
        x = torch.tensor([z], requires_grad=True)
        (torch_route(x, config, config.top_k, config.threshold).gates * torch.arange(1.0, 5.0)).sum().backward()
        assert np.isfinite(gradient).all() and x.grad.isfinite().all()
        np.testing.assert_allclose(gradient, x.grad.numpy(), atol=1e-5)
    tally("numerics", tried=2 * len(finite), lost=0)


# --- sizes ----------------------------------------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self, dtype=jnp.float32):
        self.proj = nnx.Linear(IN, OUT, use_bias=False, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.proj(x)


class TorchModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(IN, OUT, bias=False)

    def forward(self, x):
        return self.proj(x)


def pair(tmp_path, dtype="float32", **fields):
    """The same random adapter on the same base: (JAX model, PyTorch model, function in numpy float64)."""
    from peft import PeftModel

    config = config_of(**fields)
    model = Model(jnp.dtype(dtype))
    mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(2)
    state = nnx.state(model, mlj.MoeLoraParam)
    nnx.update(model, jax.tree.map(lambda v: jnp.asarray(rng.standard_normal(v.shape), v.dtype), state))
    mlj.save_pretrained(model, tmp_path)
    base = TorchModel()
    kernel = np.asarray(model.proj.base_layer.kernel[...]).astype(np.float32)
    base.proj.weight.data = torch.from_numpy(kernel.T.copy())
    base = base.to(getattr(torch, dtype))
    return model, PeftModel.from_pretrained(base, tmp_path), formula(moe_lora_interop.read(tmp_path), kernel)


def formula(adapter, kernel):
    """y = W0 x + sum_e g_e s_e B_e A_e x, in float64."""
    of = {role: t.astype(np.float64) for (_, role), t in adapter.tensors.items()}
    sizes = adapter.config.for_module("proj")

    def compute(x):
        x = x.astype(np.float64)
        gates = np.ones((*x.shape[:-1], 1))
        if sizes.has_router:
            gates = compute_gates(x @ of["router"].T, adapter.config, sizes.top_k)
        y = x @ kernel.astype(np.float64)
        for e, s in enumerate(sizes.scalings):
            a = of["lora_A"][0 if sizes.shared_lora_A else e]
            y = y + gates[..., e : e + 1] * s * (x @ a.T @ of["lora_B"][e].T)
        return y

    return compute


CASES = {
    "dense": {},
    "top_k = E": {"top_k": E},
    "top 1": {"top_k": 1},
    "one expert": {"num_experts": 1},
    "rank above in": {"r": 3 * IN},
    "64 experts, top 64": {"num_experts": 64, "top_k": 64},
    "threshold that nothing reaches": {"threshold": 1.0},
}
SHAPES = [(1, 1, IN), (1, 3, IN), (2, 1, IN), (2, 3, IN), (IN,), (1, IN), (0, IN), (0, 3, IN), (2, 0, IN)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_every_batch_shape_down_to_none(tmp_path, case, tally):
    model, peft_model, expected = pair(tmp_path, **CASES[case])
    rng = np.random.default_rng(3)
    for shape in SHAPES:
        x = rng.standard_normal(shape).astype(np.float32)
        wanted = expected(x)
        scale = np.abs(wanted).max(initial=1.0)
        for found in (np.asarray(model(jnp.asarray(x))), peft_model(torch.from_numpy(x)).detach().numpy()):
            assert found.shape == wanted.shape
            np.testing.assert_allclose(found, wanted, atol=1e-5 * scale)
    zeros = np.zeros((2, 3, IN), np.float32)  # a batch of nothing but padding
    assert not np.asarray(model(jnp.asarray(zeros))).any() and not peft_model(torch.from_numpy(zeros)).any()
    tally("numerics", tried=2 * len(SHAPES) + 2, lost=0)


def test_an_empty_batch_has_zero_gradients(tmp_path, tally):
    model, peft_model, _ = pair(tmp_path, top_k=2, router_aux_loss_coef=0.1, router_z_loss_coef=0.1)
    gradients = nnx.grad(lambda m, x: m(x).sum(), argnums=nnx.DiffState(0, mlj.MoeLoraParam))(model, jnp.zeros((0, IN)))
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(gradients))
    for name, parameter in peft_model.named_parameters():
        parameter.requires_grad_("moe_lora" in name)
    peft_model.train()
    loss = peft_model(torch.zeros(0, IN)).sum() + tuner.moe_lora_aux_loss(peft_model)
    loss.backward()
    for name, parameter in peft_model.named_parameters():
        if parameter.grad is not None:
            assert not parameter.grad.any(), name
    assert loss.item() == 0
    config, z = config_of(top_k=2, router_aux_loss_coef=0.1), jnp.zeros((0, 3, E))
    output = {"proj": route(z, Gating.of(config, config.for_module("proj")))}
    assert load_balancing_loss(output, config) == 0 and router_z_loss(output) == 0
    tally("numerics", tried=4, lost=0)


def test_all_tokens_to_one_expert(tmp_path, tally):
    """Equal tokens choose equally: the delta is that expert's alone, and balancing is at its largest, E."""
    model, peft_model, expected = pair(tmp_path, top_k=1, norm_topk_prob=False, router_aux_loss_coef=1.0)
    x = np.tile(np.random.default_rng(4).standard_normal(IN).astype(np.float32) * 30, (2, 3, 1))
    wanted = expected(x)
    for found in (np.asarray(model(jnp.asarray(x))), peft_model(torch.from_numpy(x)).detach().numpy()):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    z = np.full((2, 3, E), -50.0, np.float32)
    z[..., 1] = 50.0
    config = config_of(top_k=1, norm_topk_prob=False, router_aux_loss_coef=1.0)
    output = route(jnp.asarray(z), Gating.of(config, config.for_module("proj")))
    assert load_balancing_loss({"proj": output}, config) == pytest.approx(E)
    tally("numerics", tried=3, lost=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_softmax_of_a_half_precision_model_is_in_float32(tmp_path, dtype, tally):
    """32 nearly equal experts: gates of 1/32 computed in bf16 would be off by 0.4 %, in fp32 by 1e-6."""
    model, peft_model, _ = pair(tmp_path, dtype, num_experts=32, r=1)
    adapter = moe_lora_interop.read(tmp_path)
    x = np.random.default_rng(5).standard_normal((2, 3, IN)).astype(np.float32)
    x = np.asarray(jnp.asarray(x, dtype)).astype(np.float32)
    logits = x.astype(np.float64) @ adapter.tensors["proj", "router"].astype(np.float64).T
    expected = compute_gates(logits, adapter.config, None)
    captured = nnx.capture(model, RouterRecord)(jnp.asarray(x, dtype))[1]
    found = jax.tree.leaves(captured)
    gates = next(g for g in found if g.dtype == jnp.float32 and np.allclose(np.asarray(g).sum(-1), 1, atol=1e-4))
    np.testing.assert_allclose(np.asarray(gates).reshape(expected.shape), expected, rtol=2e-5)
    peft_model.train()
    peft_model(torch.from_numpy(x).to(getattr(torch, dtype)))
    routing = peft_model.base_model.model.proj.moe_lora_routing["default"]
    assert routing.gates.dtype == torch.float32
    np.testing.assert_allclose(routing.gates.detach().numpy().reshape(expected.shape), expected, rtol=2e-5)
    tally("numerics", tried=2, lost=0)


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e4, 1e18, 3e19, 1e30])
def test_z_loss_of_large_logits(size, tally):
    """logsumexp does not overflow; its square is infinite in float32 only beyond 1.8e19, where it says so."""
    z = np.full((1, 2, E), size, np.float32)
    expected = np.float64(np.float32(size) + np.log(E)) ** 2
    output = RouterOutput(*[jnp.asarray(z)] * 4)
    found = float(router_z_loss({"proj": output}))
    routing = tuner.RouterOutput(*[torch.from_numpy(z[0])] * 4)
    torch_found = float(torch_z_loss(routing, None))
    for value in (found, torch_found):
        assert value == (pytest.approx(expected, rel=1e-5) if expected < 3.4e38 else np.inf)
    tally("numerics", tried=2, lost=0)


def test_losses_of_padding_alone_are_zero(tally):
    config = config_of(top_k=2)
    z = jnp.asarray(np.random.default_rng(6).standard_normal((2, 3, E)), jnp.float32)
    gating = Gating.of(config, config.for_module("proj"))
    mask = jnp.zeros((2, 3), jnp.int32)
    for loss in (
        lambda z: router_z_loss({"proj": route(z, gating)}, mask),
        lambda z: load_balancing_loss({"proj": route(z, gating)}, config, mask),
    ):
        value, gradient = jax.value_and_grad(loss)(z)
        assert value == 0 and not np.asarray(gradient).any()
    tally("numerics", tried=2, lost=0)


# --- what is refused or warned of -----------------------------------------------------------------------------------


def test_a_config_that_targets_nothing_is_an_error(tally):
    from peft import get_peft_model

    for targets in ([], ["no_such"], None, "no_such.*"):
        with pytest.raises(ConfigError):
            mlj.apply_moe_lora(Model(), config_of(target_modules=targets), rngs=nnx.Rngs(0))
        with pytest.raises((ConfigError, ValueError)):
            get_peft_model(TorchModel(), tuner.MoeLoraConfig(target_modules=targets, r=2))
    tally("numerics", tried=8, lost=0)


# --- dropout and gradients ------------------------------------------------------------------------------------------


def test_dropout_in_pytorch_is_right_on_average(tmp_path, tries, tally):
    """The mean over n draws is the output without dropout within 6 standard errors of that mean."""
    _, peft_model, expected = pair(tmp_path, lora_dropout=0.5)
    n = tries(2000, 20_000)
    x = np.random.default_rng(7).standard_normal(IN).astype(np.float32)
    peft_model.train()
    torch.manual_seed(0)
    draws = peft_model(torch.from_numpy(np.tile(x, (n, 1)))).detach().numpy().astype(np.float64)
    error = draws.std(axis=0) / np.sqrt(n)
    assert (error > 0).all() and (np.abs(draws.mean(axis=0) - expected(x)) < 6 * error).all()
    tally("numerics", tried=1, lost=0)


GRADIENTS = [{}, {"top_k": 2}, {"scoring_func": "sigmoid"}, {"top_k": 2, "norm_topk_prob": False}, {"threshold": 0.1}]


@pytest.mark.parametrize("fields", GRADIENTS, ids=str)
def test_gradcheck_in_float64_pytorch(tmp_path, fields, tally):
    """torch.autograd.gradcheck of the layer: in the input, A, B and the router."""
    _, peft_model, _ = pair(tmp_path, **fields)
    peft_model = peft_model.double().eval()
    parameters = [p.requires_grad_() for name, p in peft_model.named_parameters() if "moe_lora" in name]
    assert len(parameters) == 3
    x = torch.from_numpy(np.random.default_rng(8).standard_normal((3, IN))).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: peft_model(x), (x, *parameters), eps=1e-6, atol=1e-5)
    tally("numerics", tried=1, lost=0)


IN_FLOAT64 = """
import json, sys, jax, numpy as np
import jax.numpy as jnp
from moe_lora_interop import MoeLoraConfig
from moe_lora_jax.layers.gating import Gating, route
config = MoeLoraConfig(r=2, num_experts=4, **json.loads(sys.argv[1]))
gating = Gating.of(config, config.for_module("x"))
rng = np.random.default_rng(9)
x, r = rng.standard_normal((3, 6)), rng.standard_normal((6, 4))
a, b = rng.standard_normal((4, 2, 6)), rng.standard_normal((4, 5, 2))
def delta(x, r, a, b):
    gates = route(x @ r, gating, config.threshold).gates
    return (jnp.einsum("te,eor,eri,ti->to", gates, b, a, x) ** 2).sum()
arguments = (x, r, a, b)
assert jax.jit(delta)(*arguments).dtype == jnp.float64
checked = 0
for n, gradient in enumerate(jax.grad(delta, argnums=(0, 1, 2, 3))(*arguments)):
    for index in np.ndindex(gradient.shape):
        values = []
        for step in (1e-6, -1e-6):
            moved = [v.copy() for v in arguments]
            moved[n][index] += step
            values.append(float(delta(*moved)))
        found, expected = float(gradient[index]), (values[0] - values[1]) / 2e-6
        assert abs(found - expected) < 1e-5 * max(1, abs(expected)), (n, index, found, expected)
        checked += 1
print(checked)
"""


@pytest.mark.parametrize("fields", GRADIENTS, ids=str)
def test_gradients_in_float64_jax(fields, tally):
    """In a process with jax_enable_x64: every partial derivative against central differences."""
    import json

    environment = {**os.environ, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", IN_FLOAT64, json.dumps(fields)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == 3 * 6 + 6 * 4 + 2 * 4 * 2 * 6 - 8
    tally("numerics", tried=int(done.stdout), lost=0)
