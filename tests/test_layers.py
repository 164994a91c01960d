"""The mixture layer against its formula, written out with a loop over tokens and experts in float64."""

import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from jax.test_util import check_grads

from moe_lora_interop import MoeLoraConfig
from moe_lora_jax import MoeLoraLinear, MoeLoraParam, RouterOutput
from moe_lora_jax.layers.joint_product import router_product
from moe_lora_jax.layers.router import RouterRecord
from tests.numpy_mixture import sparsemax
from tests.toy import fast_rngs, linear

IN, OUT, TOKENS = 6, 5, 7


def make_layer(param_dtype=jnp.float32, base_dtype=jnp.float32, use_bias=False, n_in=IN, n_out=OUT, seed=0, **fields):
    """A layer with random experts and a router whose gates are far from uniform."""
    config = MoeLoraConfig(**{"r": 3, "num_experts": 4, "init_lora_weights": False, **fields})
    rngs = fast_rngs(seed)
    base = linear(n_in, n_out, use_bias=use_bias, dtype=base_dtype, rngs=rngs)
    layer = MoeLoraLinear(base, n_in, n_out, config.for_module("m"), config=config, param_dtype=param_dtype, rngs=rngs)
    if layer.router is not None:
        set_router(layer, seed)
    return layer, config


def set_router(layer, seed):
    rng = np.random.default_rng(seed)
    places = [(layer.router, name) for name in ("kernel", "bias", "threshold_kernel", "threshold_bias")]
    temperature = getattr(layer.router, "temperature", None)
    places += [(temperature, name) for name in ("kernel_0", "bias_0", "kernel_1", "bias_1")]
    for place, name in places:
        variable = getattr(place, name, None)
        if variable is not None:
            variable[...] = jnp.asarray(rng.normal(size=variable.shape), variable.dtype)


def inputs(shape=(TOKENS, IN), dtype=np.float32, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def as64(variable):
    return np.asarray(variable[...]).astype(np.float64)


def softmax(z):
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


def expected_gates(layer, config, x):
    """Gates of one token, before routed_scaling_factor."""
    if layer.router is None:
        return np.ones(1)
    z = x @ as64(layer.router.kernel)
    if config.router_bias:
        z = z + as64(layer.router.bias)
    temperature = config.router_temperature
    if config.temperature_hidden_size is not None:
        own = layer.router.temperature
        codes = np.maximum(x @ as64(own.kernel_0) + as64(own.bias_0), 0)
        temperature = temperature + np.log1p(np.exp(-(codes @ as64(own.kernel_1) + as64(own.bias_1))))
    z = z / temperature
    if config.scoring_func == "abs_softmax":
        z = abs(z)
    p = {"sigmoid": 1 / (1 + np.exp(-z)), "identity": z, "sparsemax": sparsemax(z)}.get(config.scoring_func, softmax(z))
    keep, minus = np.ones(len(z), bool), 0.0
    if config.top_k is not None:
        keep = np.isin(np.arange(len(z)), np.argsort(-z, kind="stable")[: config.top_k])
    if config.threshold is not None:
        tau = config.threshold
        if config.adaptive_threshold:
            score = x @ as64(layer.router.threshold_kernel) + as64(layer.router.threshold_bias)
            tau = minus = tau / (1 + np.exp(-score))
        keep = p >= tau
    gates = np.where(keep, p - minus, 0.0)
    if config.norm_topk_prob and gates.sum() > 0:
        gates = gates / gates.sum()
    return gates


def expected_delta(layer, config, x):
    """sum_e g_e s_e B_e A_e x for every token of x [tokens, in]: A is [e, rank, in], B [e, rank, out] in the tree."""
    a, b, out = as64(layer.lora_a), as64(layer.lora_b), []
    sizes = config.for_module("m")
    for token in np.asarray(x, np.float64):
        gates, total = expected_gates(layer, config, token), np.zeros(b.shape[-1])
        for e in range(sizes.num_experts):
            rank, alpha = sizes.ranks[e], sizes.alphas[e]
            scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            a_e, b_e = a[0 if config.shared_lora_A else e, :rank], b[e, :rank].T
            total += config.routed_scaling_factor * gates[e] * scaling * (b_e @ (a_e @ token))
        out.append(total)
    return np.array(out)


def routed(layer, x):
    """(output, RouterOutput) of one call, the latter [tokens, expert]."""
    y, records = nnx.capture(layer, RouterRecord)(x)
    ((_, variable),) = nnx.to_flat_state(records)
    (output,) = variable.get_value()
    assert isinstance(output, RouterOutput)
    tokens = output.gates.shape[0]
    return y, RouterOutput(*(np.asarray(field.reshape(tokens, -1)) for field in output))


def expected_base(layer, x):
    kernel = as64(layer.base_layer.kernel)
    return np.asarray(x, np.float64) @ kernel + (0 if layer.base_layer.bias is None else as64(layer.base_layer.bias))


KINDS = {
    "dense": {},
    "top_1": dict(top_k=1),
    "top_2": dict(top_k=2),
    "top_2_raw": dict(top_k=2, norm_topk_prob=False),
    "threshold": dict(threshold=0.2),
    "adaptive": dict(threshold=0.5, adaptive_threshold=True),
    "sigmoid": dict(scoring_func="sigmoid", norm_topk_prob=False, routed_scaling_factor=0.3),
    "abs_softmax": dict(scoring_func="abs_softmax", top_k=3),
    "identity": dict(scoring_func="identity", norm_topk_prob=False),
    "identity_top_2": dict(scoring_func="identity", norm_topk_prob=False, top_k=2),
    "sparsemax": dict(scoring_func="sparsemax", router_temperature=2.0),
    "sparsemax_top_1": dict(scoring_func="sparsemax", top_k=1, norm_topk_prob=False),
    "own_temperature": dict(temperature_hidden_size=3, router_temperature=0.1),
    "own_temperature_sparsemax": dict(temperature_hidden_size=3, router_temperature=0.01, scoring_func="sparsemax"),
    "temperature_and_bias": dict(router_temperature=2.5, router_bias=True),
    "shared_A": dict(shared_lora_A=True),
    "unequal": dict(r=[1, 4, 2, 3], lora_alpha=[1.0, 2.0, 30.0, 0.5]),
    "rslora": dict(use_rslora=True, lora_alpha=5),
    "rslora_unequal": dict(use_rslora=True, r=[4, 1, 2, 2]),
    "one_expert": dict(num_experts=1),
    "shared_top_1_of_2": dict(shared_lora_A=True, num_experts=2, top_k=1, lora_alpha=[1, 7]),
}


@pytest.mark.parametrize(("kind", "use_bias"), [*((k, False) for k in KINDS), ("top_2", True), ("one_expert", True)])
def test_the_layer_computes_its_formula(kind, use_bias):
    layer, config = make_layer(use_bias=use_bias, **KINDS[kind])
    x = inputs()
    delta = expected_delta(layer, config, x)
    assert abs(delta).max() > 0.1  # not the identity
    np.testing.assert_allclose(layer.delta(jnp.asarray(x)), delta, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected_base(layer, x) + delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("top_2", s) for s in [(IN,), (TOKENS, IN), (2, 3, IN), (2, 1, 3, IN), (0, IN), (2, 0, IN)]]
    + [("adaptive", (2, 3, IN)), ("one_expert", (IN,)), ("one_expert", (0, IN))],
)
def test_any_leading_axes(kind, shape):
    layer, config = make_layer(**KINDS[kind])
    x = inputs(shape)
    y = layer(jnp.asarray(x))
    flat = x.reshape(-1, IN)
    expected = (expected_base(layer, flat) + expected_delta(layer, config, flat).reshape(-1, OUT)).reshape(
        *shape[:-1], OUT
    )
    assert y.shape == (*shape[:-1], OUT)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_one_expert_is_plain_lora():
    layer, _ = make_layer(num_experts=1, r=3, lora_alpha=6)
    a, b = layer.lora_a[...][0], layer.lora_b[...][0]
    x = jnp.asarray(inputs())
    assert layer.router is None
    np.testing.assert_array_equal(layer.delta(x), (x @ a.T * 2.0) @ b)
    assert {p[0] for p, _ in nnx.to_flat_state(nnx.state(layer, MoeLoraParam))} == {"lora_a", "lora_b"}


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "top_2", "shared_A", "unequal", "one_expert"])
def test_on_a_bf16_base_the_delta_is_computed_in_fp32(kind):
    layer, config = make_layer(base_dtype=jnp.bfloat16, **KINDS[kind])
    x = jnp.asarray(inputs(), jnp.bfloat16)
    delta = layer.delta(x)
    assert delta.dtype == jnp.float32
    expected = expected_delta(layer, config, np.asarray(x).astype(np.float64))
    np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, layer.base_layer(x) + delta.astype(jnp.bfloat16))


@pytest.mark.parametrize("base_dtype", [jnp.float32, jnp.bfloat16])
def test_a_bf16_adapter_has_an_fp32_router_and_a_bf16_delta(base_dtype):
    layer, config = make_layer(param_dtype=jnp.bfloat16, base_dtype=base_dtype, top_k=2)
    assert (layer.lora_a.dtype, layer.lora_b.dtype, layer.router.kernel.dtype) == (jnp.bfloat16,) * 2 + (jnp.float32,)
    x = jnp.asarray(inputs(), base_dtype)
    delta = layer.delta(x)
    assert delta.dtype == jnp.bfloat16 and layer(x).dtype == base_dtype
    x64 = np.asarray(x).astype(np.float64)
    expected = expected_delta(layer, config, x64)
    step = float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)
    np.testing.assert_allclose(np.asarray(delta, np.float64), expected, atol=4 * step * abs(expected).max())
    expected_routes = np.array([expected_gates(layer, config, token) for token in x64])
    np.testing.assert_allclose(routed(layer, x)[1].gates, expected_routes, rtol=1e-5, atol=1e-6)


def test_an_fp16_base_keeps_its_dtype():
    layer, _ = make_layer(base_dtype=jnp.float16)
    assert layer(jnp.asarray(inputs(), jnp.float16)).dtype == jnp.float16


# --- initial values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_layer_is_the_identity(kind):
    layer, _ = make_layer(use_bias=True, **{**KINDS[kind], "init_lora_weights": True})
    x = jnp.asarray(inputs())
    assert np.all(np.asarray(layer.lora_b[...]) == 0) and np.any(np.asarray(layer.lora_a[...]) != 0)
    np.testing.assert_array_equal(layer(x), layer.base_layer(x))


def test_initial_values_are_in_pefts_range_and_the_experts_differ():
    layer, _ = make_layer(n_in=64, r=16, num_experts=4, init_lora_weights=True)
    a = as64(layer.lora_a)
    assert a.shape == (4, 16, 64)
    assert abs(a).max() <= 64**-0.5 and abs(a).max() > 0.95 * 64**-0.5
    assert len({row.tobytes() for row in a.reshape(-1, 64)}) == 4 * 16
    assert make_layer(seed=1)[0].lora_a[...].tolist() != make_layer(seed=2)[0].lora_a[...].tolist()
    assert make_layer(seed=1)[0].lora_a[...].tolist() == make_layer(seed=1)[0].lora_a[...].tolist()


# --- gradients ------------------------------------------------------------------------------------------------------


def gradients(layer, x, key=0):
    """d loss / d every adapter variable, {name: array}, for a loss that sees every output."""
    graph, adapter, rest = nnx.split(layer, MoeLoraParam, ...)
    weights = jax.random.normal(jax.random.key(key), (*x.shape[:-1], OUT))
    loss = lambda adapter: jnp.sum((nnx.merge(graph, adapter, rest, copy=True)(x) * weights) ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(loss))(adapter)
    return {".".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(grads)}


@pytest.mark.parametrize("kind", ["dense", "top_2", "adaptive", "shared_A", "unequal"])
def test_at_b_zero_only_b_learns(kind):
    layer, _ = make_layer(**{**KINDS[kind], "init_lora_weights": True})
    grads = gradients(layer, jnp.asarray(inputs()))
    assert grads["lora_b"].any()
    assert [name for name, g in grads.items() if g.any()] == ["lora_b"]


@pytest.mark.parametrize("kind", ["dense", "top_2", "adaptive", "temperature_and_bias"])
def test_away_from_zero_everything_learns(kind):
    grads = gradients(make_layer(**KINDS[kind])[0], jnp.asarray(inputs()))
    assert all(np.isfinite(g).all() and g.any() for g in grads.values())


def test_a_renormalised_top_1_router_gets_exactly_no_gradient():
    grads = gradients(make_layer(top_k=1, router_bias=True)[0], jnp.asarray(inputs((500, IN))))
    assert grads["lora_a"].any()
    assert not grads["router.kernel"].any() and not grads["router.bias"].any()


@pytest.mark.parametrize("kind", ["dense", "top_2", "temperature_and_bias", "unequal", "shared_A"])
def test_gradients_equal_finite_differences_of_the_formula(kind):
    layer, config = make_layer(**KINDS[kind])
    x, step = inputs((3, IN)), 1e-3
    found = gradients(layer, jnp.asarray(x))
    weights = np.asarray(jax.random.normal(jax.random.key(0), (3, OUT)), np.float64)
    loss = lambda: np.sum(((expected_base(layer, x) + expected_delta(layer, config, x)) * weights) ** 2)  # noqa: E731
    rng = np.random.default_rng(0)
    for name, gradient in found.items():
        owner, leaf = (layer.router, name.split(".")[1]) if "." in name else (layer, name)
        values = np.asarray(getattr(owner, leaf)[...])
        for flat in rng.choice(values.size, min(4, values.size), replace=False):
            place, sides = np.unravel_index(flat, values.shape), []
            for sign in (1, -1):
                moved = values.copy()
                moved[place] += sign * step
                getattr(owner, leaf)[...] = jnp.asarray(moved)
                sides.append((loss(), float(moved[place])))
            getattr(owner, leaf)[...] = jnp.asarray(values)
            expected = (sides[0][0] - sides[1][0]) / (sides[0][1] - sides[1][1])
            np.testing.assert_allclose(gradient[place], expected, rtol=2e-3, atol=2e-3 * abs(gradient).max())


def test_padding_of_unequal_ranks_stays_zero_in_training():
    ranks = [1, 4, 2, 3]
    layer, _ = make_layer(r=ranks, lora_dropout=0.2)
    layer.train()
    graph, adapter, rest = nnx.split(layer, MoeLoraParam, ...)
    before = jax.tree.map(jnp.copy, adapter)
    x = jnp.asarray(inputs((20, IN)))
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    state = optimizer.init(adapter)

    @jax.jit
    def step(adapter, rest, state):
        grads = jax.grad(lambda p, rest: jnp.sum((nnx.merge(graph, p, rest, copy=True)(x) - 1) ** 2))(adapter, rest)
        updates, state = optimizer.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state

    for _ in range(5):
        adapter, state = step(adapter, rest, state)
    used = np.arange(4) < np.array(ranks)[:, None]
    for name in ("lora_a", "lora_b"):
        after = np.asarray(adapter[name][...])
        assert not after[~used].any()
        assert (after[used] != np.asarray(before[name][...])[used]).any(axis=-1).all()


# --- which variables are the adapter's ------------------------------------------------------------------------------


def paths(layer, kind):
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(layer, kind))}


def test_the_adapters_variables_are_selected_by_their_own_type():
    layer, _ = make_layer(use_bias=True, router_bias=True, threshold=0.5, adaptive_threshold=True)
    router = {f"router.{name}" for name in ("kernel", "bias", "threshold_kernel", "threshold_bias")}
    assert paths(layer, MoeLoraParam) == {"lora_a", "lora_b"} | router


def test_the_param_filter_also_catches_the_frozen_base():
    layer, _ = make_layer(use_bias=True)
    assert paths(layer, nnx.Param) == paths(layer, MoeLoraParam) | {"base_layer.kernel", "base_layer.bias"}


# --- training only --------------------------------------------------------------------------------------------------

RANDOM = {
    "lora_dropout": dict(lora_dropout=0.5),
    "expert_dropout": dict(expert_dropout=0.5),
    "jitter": dict(router_jitter_noise=0.3),
    "all": dict(lora_dropout=0.2, expert_dropout=0.2, router_jitter_noise=0.2, top_k=2),
}


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, jnp.float32) for kind in RANDOM), ("all", jnp.bfloat16)])
def test_randomness_is_in_training_only(kind, dtype):
    layer, config = make_layer(base_dtype=dtype, **RANDOM[kind])
    x = jnp.asarray(inputs(), dtype)
    expected = expected_delta(layer, config, np.asarray(x).astype(np.float64))
    np.testing.assert_allclose(layer.delta(x), expected, rtol=1e-5, atol=1e-5)
    layer.train()
    first, second = np.asarray(layer.delta(x)), np.asarray(layer.delta(x))
    assert (first != second).any() and (abs(first - expected) > 1e-3).any()
    layer.eval()
    np.testing.assert_allclose(layer.delta(x), expected, rtol=1e-5, atol=1e-5)


def test_without_randomness_training_computes_what_evaluation_does():
    layer, _ = make_layer(top_k=2)
    x = jnp.asarray(inputs())
    before = layer(x)
    layer.train()
    np.testing.assert_array_equal(layer(x), before)


@pytest.mark.parametrize("kind", ["lora_dropout", "expert_dropout"])
def test_dropout_is_right_on_average(kind):
    layer, config = make_layer(**RANDOM[kind])
    draws = 20_000
    x = inputs((1, IN)).repeat(draws, 0)  # every row is a draw of its own
    layer.train()
    deltas = np.asarray(layer.delta(jnp.asarray(x)), np.float64)
    expected = expected_delta(layer, config, x[:1])[0]
    error = deltas.std(axis=0) / math.sqrt(draws)
    assert (error > 0).all()
    assert (abs(deltas.mean(axis=0) - expected) < 5 * error).all()


def test_lora_dropout_drops_whole_inputs_of_the_experts_and_none_of_the_router():
    layer, config = make_layer(lora_dropout=0.5, num_experts=2, top_k=1)
    set_router(layer, 3)
    x = inputs((1, IN)).repeat(200, 0)
    layer.train()
    gates = routed(layer, jnp.asarray(x))[1].gates
    assert (gates == gates[0]).all()
    expert = int(gates[0].argmax())
    a, b = as64(layer.lora_a)[expert], as64(layer.lora_b)[expert]
    masks = np.array(list(np.ndindex(*(2,) * IN)))
    allowed = config.for_module("m").scalings[expert] * (x[0] * masks / 0.5) @ a.T @ b
    distances = abs(np.asarray(layer.delta(jnp.asarray(x)))[:, None] - allowed[None]).max(axis=-1)
    assert distances.min(axis=-1).max() < 1e-4
    assert len(set(distances.argmin(axis=-1))) > 30


def test_expert_dropout_drops_whole_experts():
    layer, config = make_layer(expert_dropout=0.5, num_experts=2)
    x = inputs((1, IN))
    layer.train()
    deltas = np.asarray(layer.delta(jnp.asarray(x.repeat(200, 0))))
    gates, sizes = expected_gates(layer, config, x[0].astype(np.float64)), config.for_module("m")
    parts = [
        2 * gates[e] * sizes.scalings[e] * (x[0] @ as64(layer.lora_a)[e].T) @ as64(layer.lora_b)[e] for e in range(2)
    ]
    allowed = np.array([0 * parts[0], parts[0], parts[1], parts[0] + parts[1]])
    distances = abs(deltas[:, None] - allowed[None]).max(axis=-1)
    assert distances.min(axis=-1).max() < 1e-4
    assert set(distances.argmin(axis=-1)) == {0, 1, 2, 3}


def test_jitter_moves_the_routers_input_only_and_by_no_more_than_its_bound():
    noise = 0.3
    layer, _ = make_layer(router_jitter_noise=noise)
    x = jnp.asarray(inputs((1, IN)).repeat(500, 0))
    kernel = np.asarray(layer.router.kernel[...])
    layer.train()
    moved = routed(layer, x)[1].logits - np.asarray(x) @ kernel
    bound = noise * abs(np.asarray(x)[0]) @ abs(kernel)
    assert (abs(moved) <= bound + 1e-5).all() and abs(moved).max() > 0.3 * bound.max()
    layer.router.kernel[...] = jnp.zeros_like(layer.router.kernel[...])  # equal gates, whatever the input
    trained = layer.delta(x)
    layer.eval()
    np.testing.assert_allclose(trained, layer.delta(x), rtol=1e-5, atol=1e-5)


# --- router outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "top_2", "sigmoid", "temperature_and_bias"])
@pytest.mark.parametrize("base_dtype", [jnp.float32, jnp.bfloat16])
def test_captured_router_outputs_are_the_logits_and_gates(kind, base_dtype):
    layer, config = make_layer(base_dtype=base_dtype, **KINDS[kind])
    x = jnp.asarray(inputs(), base_dtype)
    y, output = routed(layer, x)
    np.testing.assert_array_equal(y, layer(x))
    assert output.logits.dtype == output.gates.dtype == np.float32
    x64 = np.asarray(x).astype(np.float64)
    bias = as64(layer.router.bias) if config.router_bias else 0
    logits = (x64 @ as64(layer.router.kernel) + bias) / config.router_temperature
    np.testing.assert_allclose(output.logits, logits, rtol=1e-5, atol=1e-5)
    gates = np.array([expected_gates(layer, config, token) for token in x64])
    np.testing.assert_allclose(output.gates, gates, rtol=1e-5, atol=1e-6)


def test_nothing_is_left_in_the_layer_after_a_call():
    layer, _ = make_layer(lora_dropout=0.1)
    before = paths(layer, ...)
    layer.train()
    layer(jnp.asarray(inputs()))
    routed(layer, jnp.asarray(inputs()))
    assert paths(layer, ...) == before


# --- how it is computed ---------------------------------------------------------------------------------------------


def equations(jaxpr, machine="cpu"):
    """Every equation, those inside calls too; of what differs by machine, the branch for this one."""
    for eqn in jaxpr.eqns:
        yield eqn
        inside = dict(eqn.params)
        if platforms := inside.get("branches_platforms"):
            inside = {"branch": inside["branches"][0 if machine in platforms[0] else 1]}
        for value in inside.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, machine)


def program(layer, x, backward):
    """The forward pass or the gradient of its sum, as a function of arrays; and its arguments."""
    graph, adapter, rest = nnx.split(layer, MoeLoraParam, ...)

    def forward(adapter, x, rest):
        return nnx.merge(graph, adapter, rest, copy=True)(x)

    def loss(adapter, x, rest):
        return jnp.sum(forward(adapter, x, rest).astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1)) if backward else forward, (adapter, x, rest)


def trace(layer, x, backward=False, machine="cpu"):
    function, arguments = program(layer, x, backward)
    return list(equations(jax.make_jaxpr(function)(*arguments).jaxpr, machine))


def products(layer, x, machine="cpu"):
    """Of the forward pass: the operands' dtypes, the columns and the precision of every product that has any."""
    found = [e for e in trace(layer, x, machine=machine) if e.primitive.name == "dot_general"]
    shapes = [(e, [v.aval for v in e.invars], e.outvars[0].aval.shape) for e in found]
    return [
        ([v.dtype for v in given], shape[-1], e.params["precision"]) for e, given, shape in shapes if 0 not in shape
    ]


BIG = dict(n_in=11, n_out=13, r=3, num_experts=5)


@pytest.mark.parametrize("fields", [{}, dict(top_k=2), dict(shared_lora_A=True), dict(lora_dropout=0.1)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_no_buffer_has_tokens_experts_and_inputs_or_outputs(fields, dtype, backward):
    layer, _ = make_layer(base_dtype=dtype, **BIG, **fields)
    layer.train()
    tokens = 7
    function, arguments = program(layer, jnp.zeros((tokens, 11), dtype), backward)
    text = jax.jit(function).lower(*arguments).compile().as_text()
    results = re.findall(r"^ +(?:ROOT )?%(\S+) = \w+\[([\d,]*)\]", text[text.index("ENTRY") :], re.MULTILINE)
    assert len(results) > 10
    for name, shape in results:
        assert math.prod(map(int, filter(None, shape.split(",")))) < tokens * 5 * 11, (name, shape)


@pytest.mark.parametrize("fields", [{}, dict(top_k=2), dict(threshold=0.1), dict(shared_lora_A=True)], ids=str)
def test_the_number_of_operations_does_not_depend_on_the_number_of_experts(fields):
    programs = []
    for experts in (4, 16):
        layer, _ = make_layer(num_experts=experts, **fields)
        programs.append([eqn.primitive.name for eqn in trace(layer, jnp.zeros((7, IN)), backward=True)])
    assert programs[0] == programs[1]
    assert not {"while", "scan"} & set(programs[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("fields", [{}, dict(lora_dropout=0.1), dict(num_experts=1)], ids=str)
def test_three_products_and_the_routers_in_full_fp32(fields, dtype):
    layer, _ = make_layer(param_dtype=dtype, base_dtype=dtype, **fields)
    layer.train()
    found = products(layer, jnp.zeros((7, IN), dtype))
    routers = [(dtypes, precision) for dtypes, columns, precision in found if columns == 4]
    assert (len(found), len(routers)) == ((3, 0) if "num_experts" in fields else (4, 1))
    for dtypes, precision in routers:  # so that neither a bf16 model nor TF32 can blur its choice
        assert dtypes == [jnp.float32] * 2 and precision == (jax.lax.Precision.HIGHEST,) * 2


def test_elsewhere_a_bf16_input_takes_a_and_the_router_in_one_product():
    layer, _ = make_layer(base_dtype=jnp.bfloat16)
    found = products(layer, jnp.zeros((7, IN), jnp.bfloat16), "tpu")
    assert [dtypes for dtypes, _, _ in found] == [[jnp.bfloat16] * 2] * 3
    assert sorted(columns for _, columns, _ in found) == [OUT, OUT, 4 * 3 + 4 * 3]  # base, B, and A beside 3 R


@pytest.mark.parametrize("fixed", [None, "x", "kernel"])
def test_the_routers_product_has_derivatives_of_every_kind(fixed):
    x, kernel = jnp.asarray(inputs((3, IN))), jnp.asarray(inputs((IN, 4), seed=2))
    function = {
        None: lambda x, kernel: jnp.sin(router_product(x, kernel)),
        "x": lambda kernel: jnp.sin(router_product(x, kernel)),
        "kernel": lambda x: jnp.sin(router_product(x, kernel)),
    }[fixed]
    arguments = {None: (x, kernel), "x": (kernel,), "kernel": (x,)}[fixed]
    plain = {None: lambda x, k: jnp.sin(x @ k), "x": lambda k: jnp.sin(x @ k), "kernel": lambda x: jnp.sin(x @ kernel)}
    check_grads(function, arguments, order=2, modes=("fwd", "rev"), atol=1e-2, rtol=1e-2)  # finite differences, fp32
    np.testing.assert_allclose(jax.hessian(function)(*arguments), jax.hessian(plain[fixed])(*arguments), atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "top_2", "adaptive", "one_expert"])
def test_jit_changes_nothing(kind):
    layer, _ = make_layer(**KINDS[kind])
    x = jnp.asarray(inputs((2, 3, IN)))
    graph, state = nnx.split(layer)
    compiled = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)
    np.testing.assert_allclose(compiled, layer(x), rtol=1e-5, atol=1e-6)
