"""One wrapped linear layer against the formula, by a loop over experts; parameters, precision, dropout, refusals."""

import copy
import pickle

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from test_peft_support import COMBINATIONS, gates_by_hand
from torch import nn
from transformers.pytorch_utils import Conv1D

import moe_lora_interop.peft_tuner as tuner
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.errors import ConfigError
from moe_lora_interop.peft_tuner.layer import Linear, MoeLoraLayer
from moe_lora_interop.peft_tuner.model import MoeLoraModel
from tests.numpy_mixture import sparsemax

IN, OUT = 6, 5


def layer(dtype=torch.float64, base: nn.Module | None = None, **fields) -> Linear:
    """A random layer named `fc`, in eval mode, with large router and threshold weights so that selection matters."""
    torch.manual_seed(0)
    fields = {"r": 2, "lora_alpha": 3, "num_experts": 4, "init_lora_weights": False} | fields
    model = nn.Sequential()
    model.add_module("fc", (base or nn.Linear(IN, OUT)).to(dtype))
    MoeLoraModel(model, tuner.MoeLoraConfig(target_modules=["fc"], **fields), "default")
    wrapped = model.fc
    for name, parameter in wrapped.named_parameters():
        if any(word in name for word in ("router", "threshold", "temperature")):
            nn.init.normal_(parameter)
    return wrapped.eval()


def inputs(dtype=torch.float64, shape=(2, 5, IN)) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def delta_by_hand(wrapped: Linear, x: np.ndarray) -> np.ndarray:
    """The docstring of moe_lora_interop.config for one token x [in], in float64 with a loop over experts."""
    c, m = wrapped.moe_lora_config["default"], wrapped.moe_lora_module_config["default"]
    get = lambda p: p.detach().double().numpy()  # noqa: E731
    a, b = get(wrapped.moe_lora_A["default"]), get(wrapped.moe_lora_B["default"])
    if m.num_experts == 1:
        return m.scalings[0] * b[0] @ (a[0] @ x)
    router = wrapped.moe_lora_router["default"]
    z = get(router.weight) @ x
    if router.bias is not None:
        z = z + get(router.bias)
    tau = c.threshold
    if c.adaptive_threshold:
        w = wrapped.moe_lora_threshold["default"]
        tau = c.threshold / (1 + np.exp(-(get(w.weight) @ x + get(w.bias)).item()))
    temperature = c.router_temperature
    if c.temperature_hidden_size:
        first, second = (d["default"] for d in (wrapped.moe_lora_temperature_0, wrapped.moe_lora_temperature_1))
        hidden = np.maximum(get(first.weight) @ x + get(first.bias), 0)
        temperature = temperature + np.log1p(np.exp(-(get(second.weight) @ hidden + get(second.bias))))
    g = gates_by_hand(z / temperature, c, m.top_k, tau)
    delta = np.zeros(b.shape[1])
    for e in range(m.num_experts):
        a_e = a[0] if c.shared_lora_A else a[e]
        s_e = m.alphas[e] / (np.sqrt(m.ranks[e]) if c.use_rslora else m.ranks[e])
        delta += c.routed_scaling_factor * g[e] * s_e * (b[e] @ (a_e @ x))
    return delta


def expected(wrapped: Linear, x: torch.Tensor) -> np.ndarray:
    flat = x.detach().double().reshape(-1, IN).numpy()
    out = np.stack([delta_by_hand(wrapped, row) for row in flat]).reshape(*x.shape[:-1], OUT)
    return out + wrapped.base_layer(x).detach().double().numpy()


@pytest.mark.parametrize("shared", [False, True], ids=["A_per_expert", "A_shared"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("fields", COMBINATIONS)
@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_forward_equals_the_formula(fields, bias, shared):
    extra = {"router_temperature": 0.7, "routed_scaling_factor": 1.3} if bias else {}
    wrapped = layer(router_bias=bias, shared_lora_A=shared, **fields, **extra)
    x = inputs()
    np.testing.assert_allclose(wrapped(x).detach().numpy(), expected(wrapped, x), atol=1e-13)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": [1, 3, 2, 3], "lora_alpha": [1.0, 2.0, 5.0, 3.0]},
        {"r": [1, 3, 2, 3], "use_rslora": True},
        {"num_experts": 1},
        {"num_experts": 1, "adaptive_threshold": True, "threshold": 0.5},
        {"num_experts": 1, "temperature_hidden_size": 2},
        {"temperature_hidden_size": 2, "scoring_func": "sparsemax", "router_temperature": 0.2},
        {"num_experts_pattern": {"fc": 2}, "rank_pattern": {"fc": 3}, "alpha_pattern": {"f.": 7.0}},
        {"num_experts_pattern": {"fc": 2}, "top_k_pattern": {"fc": 1}},
        {"num_experts_pattern": {"fc": 1}, "top_k": 2},
    ],
    ids=["ranks", "rslora", "one", "one_adaptive", "one_T", "T", "pattern_sizes", "pattern_top_k", "pattern_one"],
)
@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_sizes_and_scalings(fields):
    wrapped = layer(**fields)
    x = inputs()
    np.testing.assert_allclose(wrapped(x).detach().numpy(), expected(wrapped, x), atol=1e-13)
    module = MoeLoraConfig(target_modules=["fc"], **{"r": 2, "lora_alpha": 3} | fields).for_module("fc")
    assert wrapped.moe_lora_A["default"].shape == (module.num_experts, module.rank, IN)
    assert wrapped.moe_lora_B["default"].shape == (module.num_experts, OUT, module.rank)
    assert len(wrapped.moe_lora_router) == (module.num_experts > 1)
    assert len(wrapped.moe_lora_threshold) == (module.num_experts > 1 and "adaptive_threshold" in fields)
    assert len(wrapped.moe_lora_temperature_1) == (module.num_experts > 1 and "temperature_hidden_size" in fields)


@pytest.mark.parametrize("shape", [(IN,), (3, IN), (0, IN), (2, 3, 4, IN)])
def test_any_leading_shape(shape):
    wrapped = layer(top_k=2)
    x = inputs(shape=shape)
    assert wrapped(x).shape == (*shape[:-1], OUT)
    if x.numel():
        np.testing.assert_allclose(wrapped(x).detach().numpy(), expected(wrapped, x), atol=1e-13)


@pytest.mark.parametrize("fields", COMBINATIONS)
@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_gradients_equal_those_of_a_loop_over_experts(fields):
    wrapped = layer(router_bias=True, **fields)
    c = wrapped.moe_lora_config["default"]
    x = inputs(shape=(8, IN)).requires_grad_()
    target = torch.randn(8, OUT, dtype=torch.float64)
    parameters = [p for n, p in wrapped.named_parameters() if "base_layer" not in n]
    fused = torch.autograd.grad((wrapped(x) * target).sum(), [x, *parameters])

    a, b, router = (d["default"] for d in (wrapped.moe_lora_A, wrapped.moe_lora_B, wrapped.moe_lora_router))
    z = x @ router.weight.T + router.bias
    tau = c.threshold
    if c.adaptive_threshold:
        threshold = wrapped.moe_lora_threshold["default"]
        tau = c.threshold * torch.sigmoid(x @ threshold.weight.T + threshold.bias)
    scores = {"softmax": z.softmax(-1), "abs_softmax": z.abs().softmax(-1), "sigmoid": z.sigmoid(), "identity": z}
    if c.scoring_func == "sparsemax":  # z - t where that is above 0, t from the definition
        above = torch.from_numpy(np.stack([sparsemax(row) for row in z.detach().numpy()]) > 0)
        scores["sparsemax"] = (z - ((z * above).sum(-1, keepdim=True) - 1) / above.sum(-1, keepdim=True)) * above
    p = scores[c.scoring_func]
    if c.top_k:
        keep = p >= p.sort(-1, descending=True).values[:, [c.top_k - 1]]
    else:
        keep = p >= (-torch.inf if tau is None else tau)
    g = (p - tau if c.adaptive_threshold else p) * keep
    if c.norm_topk_prob:
        g = g / g.sum(-1, keepdim=True).clamp_min(1e-300)
    y = wrapped.base_layer(x)
    for e in range(4):
        y = y + g[:, [e]] * 1.5 * (x @ a[e].T @ b[e].T)
    naive = torch.autograd.grad((y * target).sum(), [x, *parameters])
    for ours, theirs in zip(fused, naive, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gradients_equal_finite_differences():
    wrapped = layer(top_k=2, router_bias=True, shared_lora_A=True)
    names = [n for n, _ in wrapped.named_parameters() if "base_layer" not in n]

    def run(x, *values):
        return torch.func.functional_call(wrapped, dict(zip(names, values, strict=True)), (x,))

    values = [wrapped.get_parameter(n).detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(run, (inputs(shape=(3, IN)).requires_grad_(), *values))


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"lora_alpha": 5, "r": 3}])
def test_one_expert_is_bit_equal_to_stock_lora(fields):
    wrapped = layer(torch.float32, num_experts=1, **fields)
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("fc", copy.deepcopy(wrapped.base_layer))
    stock = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 3} | fields, target_modules=["fc"]))
    fc = stock.base_model.model.fc
    fc.lora_A["default"].weight.data = wrapped.moe_lora_A["default"].data[0]
    fc.lora_B["default"].weight.data = wrapped.moe_lora_B["default"].data[0]
    x = inputs(torch.float32)
    assert torch.equal(fc(x), wrapped(x))


def test_initialisation():
    wrapped = layer(torch.float32, base=nn.Linear(400, 300), r=[4, 8], num_experts=2, init_lora_weights=True)
    a, b = wrapped.moe_lora_A["default"], wrapped.moe_lora_B["default"]
    reference = nn.init.kaiming_uniform_(torch.empty(8, 400), a=5**0.5)
    assert 0.95 * reference.abs().max() < a[1].abs().max() <= 1 / 20
    assert abs(a[1].std() / reference.std() - 1) < 0.05
    assert (b == 0).all() and (a[0, 4:] == 0).all() and (a[0, :4] != 0).all()
    x = torch.randn(3, 400)
    assert torch.equal(wrapped(x), wrapped.base_layer(x))
    random = layer(torch.float32, base=nn.Linear(400, 300), r=[4, 8], num_experts=2)
    assert (random.moe_lora_B["default"][0, :, 4:] == 0).all()
    assert (random(x) - random.base_layer(x)).abs().max() > 0.01
    c = MoeLoraConfig(threshold=0.6, adaptive_threshold=True, router_bias=True)
    fresh = Linear(nn.Linear(400, 300))
    fresh.update_layer("default", c, c.for_module("fc"))
    router, threshold = fresh.moe_lora_router["default"], fresh.moe_lora_threshold["default"]
    assert abs(router.weight.std() / 0.02 - 1) < 0.1
    assert all((p == 0).all() for p in (router.bias, threshold.weight, threshold.bias))


def test_padding_of_unequal_ranks_stays_zero_in_training():
    wrapped = layer(torch.float32, r=[1, 3, 2, 3])
    optimizer = torch.optim.AdamW([p for n, p in wrapped.named_parameters() if "base_layer" not in n], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(inputs(torch.float32)).square().sum().backward()
        optimizer.step()
    assert (wrapped.moe_lora_A["default"][0, 1:] == 0).all() and (wrapped.moe_lora_B["default"][2, :, 2:] == 0).all()


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upcast", [True, False])
def test_half_precision_bases_route_in_fp32(base, upcast):
    wrapped = layer(base, top_k=2)
    if upcast:
        peft.tuners.tuners_utils.cast_adapter_dtype(wrapped, "default")
    dtype = torch.float32 if upcast else base
    assert {p.dtype for n, p in wrapped.named_parameters() if "base_layer" not in n} == {dtype}
    x = inputs(base)
    wrapped.train()
    assert wrapped(x).dtype == base
    routing = wrapped.moe_lora_routing["default"]
    assert routing.gates.dtype == torch.float32
    router = wrapped.moe_lora_router["default"].weight
    torch.testing.assert_close(routing.logits, F.linear(x.float().reshape(-1, IN), router.float()))
    delta = wrapped._delta("default", x)
    assert delta.dtype == dtype
    by_hand = np.stack([delta_by_hand(wrapped, row) for row in x.double().reshape(-1, IN).numpy()])
    error = np.abs(delta.detach().double().numpy().reshape(-1, OUT) - by_hand).max()
    assert error < (1e-5 if upcast else 0.05 * np.abs(by_hand).max())


def test_under_autocast_the_router_stays_in_fp32():
    wrapped = layer(torch.float32, top_k=2).train()
    x = inputs(torch.float32)
    wrapped(x)
    plain = wrapped.moe_lora_routing["default"]
    with torch.autocast("cpu", torch.bfloat16):
        y = wrapped(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(wrapped.moe_lora_routing["default"].logits, plain.logits)


def test_dropout_is_one_mask_for_all_experts_and_not_for_the_router():
    wrapped = layer(torch.float32, lora_dropout=0.5, shared_lora_A=True).train()
    x = inputs(torch.float32)
    torch.manual_seed(3)
    y = wrapped(x)
    routing = wrapped.moe_lora_routing["default"]
    torch.manual_seed(3)
    dropped = F.dropout(x.reshape(-1, IN), 0.5)
    a, b = wrapped.moe_lora_A["default"], wrapped.moe_lora_B["default"]
    delta = sum(routing.gates[:, [e]] * 1.5 * (dropped @ a[0].T @ b[e].T) for e in range(4))
    torch.testing.assert_close(y, wrapped.base_layer(x) + delta.reshape(y.shape))
    torch.testing.assert_close(routing.logits, F.linear(x.reshape(-1, IN), wrapped.moe_lora_router["default"].weight))


def test_expert_dropout_is_inverted_dropout_on_the_gates():
    wrapped = layer(torch.float32, expert_dropout=0.25).train()
    x = inputs(torch.float32)
    torch.manual_seed(3)
    y = wrapped(x)
    gates = wrapped.moe_lora_routing["default"].gates
    torch.manual_seed(3)
    gates = F.dropout(gates, 0.25)
    assert (gates == 0).any()
    a, b = wrapped.moe_lora_A["default"], wrapped.moe_lora_B["default"]
    delta = sum(gates[:, [e]] * 1.5 * (x.reshape(-1, IN) @ a[e].T @ b[e].T) for e in range(4))
    torch.testing.assert_close(y, wrapped.base_layer(x) + delta.reshape(y.shape))


def test_jitter_changes_the_router_s_input_only():
    wrapped = layer(torch.float32, router_jitter_noise=0.1, num_experts=4).train()
    x = inputs(torch.float32)
    torch.manual_seed(3)
    wrapped(x)
    logits = wrapped.moe_lora_routing["default"].logits
    torch.manual_seed(3)
    flat = x.reshape(-1, IN)
    jittered = flat * torch.empty_like(flat).uniform_(0.9, 1.1)
    torch.testing.assert_close(logits, F.linear(jittered, wrapped.moe_lora_router["default"].weight))


def test_nothing_is_random_in_evaluation():
    wrapped = layer(torch.float32, lora_dropout=0.5, expert_dropout=0.5, router_jitter_noise=0.5)
    x = inputs(torch.float32)
    assert torch.equal(wrapped(x), wrapped(x))
    torch.testing.assert_close(wrapped(x).double().detach().numpy(), expected(wrapped, x), atol=1e-5, rtol=1e-5)


def test_the_routing_is_kept_in_training_only_and_never_copied():
    wrapped = layer(torch.float32).train()
    wrapped(inputs(torch.float32))
    assert wrapped.moe_lora_routing["default"].gates.shape == (10, 4)
    for again in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert again.moe_lora_routing == {}
        assert torch.equal(again(inputs(torch.float32)), wrapped(inputs(torch.float32)))
    wrapped.eval()(inputs(torch.float32))
    assert wrapped.moe_lora_routing == {}
    assert not any("routing" in key for key in wrapped.state_dict())


def test_wraps_conv1d():
    wrapped = layer(base=Conv1D(OUT, IN), top_k=2)
    x = inputs()
    np.testing.assert_allclose(wrapped(x).detach().numpy(), expected(wrapped, x), atol=1e-13)


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (nn.Embedding(4, 4), "emb", "'emb': no linear layer of this name is targeted"),
        (nn.MultiheadAttention(4, 2), "out_proj", "no linear layer of this name"),
    ],
)
def test_layers_that_cannot_be_wrapped_by_name(module, name, message):
    model = nn.ModuleDict({"emb": module, "fc": nn.Linear(4, 4)})
    with pytest.raises(ConfigError, match=message):
        MoeLoraModel(model, tuner.MoeLoraConfig(target_modules=[name, "fc"]), "default")
    assert not any(isinstance(m, MoeLoraLayer) for m in model.modules())


@pytest.mark.parametrize(
    ("module", "pattern", "message"),
    [
        (nn.Embedding(4, 4), "emb|fc", "target module 'emb' is not supported: Embedding: expected torch.nn.Linear"),
        (nn.MultiheadAttention(4, 2), ".*out_proj|fc", "reads its weight without calling it"),
    ],
)
def test_layers_that_cannot_be_wrapped_by_regular_expression(module, pattern, message):
    model = nn.ModuleDict({"emb": module, "fc": nn.Linear(4, 4)})
    with pytest.raises(TypeError, match=message):
        MoeLoraModel(model, tuner.MoeLoraConfig(target_modules=pattern), "default")
