"""Gates against the formula in float64 numpy; gradients against finite differences of that formula."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from moe_lora_interop import ConfigError, MoeLoraConfig
from moe_lora_jax.layers.gating import Gating, route, sparsemax
from tests.numpy_mixture import entropy

EXPERTS, TOKENS = 5, 32
SELECTIONS = {
    "dense": {},
    "top_1": dict(top_k=1),
    "top_2": dict(top_k=2),
    "top_all": dict(top_k=EXPERTS),
    "top_p": dict(top_k=1, top_p=0.7),
    "entropy": dict(top_k=2, top_p=0.8, entropy_threshold=0.6, entropy_index=1.5, entropy_eps=1e-4),
    "shannon": dict(top_k=1, entropy_threshold=0.5),
    "threshold": dict(threshold=0.22),
    "adaptive": dict(threshold=0.4, adaptive_threshold=True),
}


def valid_configs():
    for scoring, (name, selection), norm in itertools.product(
        ["softmax", "abs_softmax", "sigmoid", "identity", "sparsemax"], SELECTIONS.items(), [True, False]
    ):
        factor = 1.0 if name == "dense" else 2.5
        fields = dict(scoring_func=scoring, norm_topk_prob=norm, routed_scaling_factor=factor, **selection)
        try:
            config = MoeLoraConfig(num_experts=EXPERTS, **fields)
        except ConfigError:
            continue
        yield pytest.param(config, id=f"{scoring}-{name}-{'norm' if norm else 'raw'}")


CONFIGS = list(valid_configs())


def reference_gates(config, logits, tau=None):
    """Token by token, expert by expert, as the config's docstring has it."""
    gates = np.zeros(logits.shape, np.float64)
    for row, z in enumerate(np.asarray(logits, np.float64)):
        score = {
            "softmax": lambda v: np.exp(v - v.max()) / np.exp(v - v.max()).sum(),
            "abs_softmax": lambda v: np.exp(abs(v) - abs(v).max()) / np.exp(abs(v) - abs(v).max()).sum(),
            "sigmoid": lambda v: 1 / (1 + np.exp(-v)),
            "identity": lambda v: v,
            "sparsemax": nearest_probabilities,
        }[config.scoring_func](z)
        order = abs(z) if config.scoring_func == "abs_softmax" else z
        kept = set(range(len(z)))
        if config.top_k is not None:
            descending = sorted(kept, key=lambda e: (-order[e], e))
            kept = set(descending[: config.top_k])
            for n in range(len(z)) if config.top_p is not None else ():
                kept |= {descending[n]} if sum(score[descending[: n + 1]]) <= config.top_p else set()
            if config.entropy_threshold is not None and entropy(score, config) > config.entropy_threshold:
                kept = set(range(len(z)))
        if config.threshold is not None:
            kept = {e for e in kept if score[e] >= tau[row]}
        for e in kept:
            gates[row, e] = score[e] - (tau[row] if config.adaptive_threshold else 0)
        if config.norm_topk_prob and gates[row].sum() > 0:
            gates[row] /= gates[row].sum()
    return gates


def nearest_probabilities(z):
    """max(z - t, 0), t such that the sum is 1, by bisection."""
    low, high = z.max() - 1, z.max()
    for _ in range(100):
        t = (low + high) / 2
        low, high = (t, high) if np.maximum(z - t, 0).sum() > 1 else (low, t)
    return np.maximum(z - high, 0)


def thresholds(config, rng, rows):
    """tau per token: one number, or learned (here: random below the largest)."""
    if config.threshold is None:
        return None
    return config.threshold * (rng.uniform(0.2, 1, rows) if config.adaptive_threshold else np.ones(rows))


def gates_of(config, logits, tau=None):
    gating = Gating.of(config, config.for_module("m"))
    if tau is not None:
        tau = jnp.asarray(tau, jnp.float32)[:, None] if config.adaptive_threshold else config.threshold
    return route(jnp.asarray(logits, jnp.float32), gating, tau).gates


def away_from_edges(config, logits, tau):
    """Rows whose selection no rounding error and no small step can change."""
    z = abs(logits) if config.scoring_func == "abs_softmax" else logits
    close = np.diff(np.sort(z, axis=-1), axis=-1).min(axis=-1) < 1e-2
    if config.scoring_func == "sparsemax":
        score = np.stack([nearest_probabilities(row) for row in np.asarray(z, np.float64)])
        above = z - (z - score).max(-1, keepdims=True, where=score > 0, initial=-np.inf)  # z - t
        close |= abs(above).min(axis=-1) < 1e-3
    elif tau is not None:
        exp = np.exp(z - z.max(-1, keepdims=True))
        score = 1 / (1 + np.exp(-z)) if config.scoring_func == "sigmoid" else exp / exp.sum(-1, keepdims=True)
    if tau is not None:
        close |= abs(score - tau[:, None]).min(axis=-1) < 1e-3
    if config.keeps_more:
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        if config.top_p is not None:
            close |= abs(np.cumsum(-np.sort(-p, axis=-1), axis=-1) - config.top_p).min(axis=-1) < 1e-3
        if config.entropy_threshold is not None:
            close |= abs(np.array([entropy(row, config) for row in p]) - config.entropy_threshold) < 1e-3
    return ~close & (abs(logits).min(axis=-1) > 1e-2)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("config", CONFIGS)
def test_gates_equal_the_formula(config, rng):
    logits = rng.normal(0, 2, (TOKENS, EXPERTS)).astype(np.float32)
    tau = thresholds(config, rng, TOKENS)
    usable = away_from_edges(config, logits, tau)
    assert usable.sum() > TOKENS / 2
    found = gates_of(config, logits, tau)
    assert found.dtype == jnp.float32
    found = np.asarray(found)
    expected = reference_gates(config, logits, tau)
    np.testing.assert_allclose(found[usable], expected[usable], rtol=2e-6, atol=1e-7)
    assert np.array_equal((found != 0)[usable], (expected != 0)[usable])  # zeros are exact


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_equal_finite_differences_of_the_formula(config, rng):
    logits = rng.normal(0, 2, (TOKENS, EXPERTS))
    tau = thresholds(config, rng, TOKENS)
    usable = away_from_edges(config, logits, tau)
    logits, tau = logits[usable][:8], None if tau is None else tau[usable][:8]
    weights = rng.normal(size=logits.shape)
    found = jax.grad(lambda z: jnp.sum(gates_of(config, z, tau) * weights))(jnp.asarray(logits, jnp.float32))
    expected, step = np.zeros_like(logits), 1e-6
    for place in np.ndindex(logits.shape):
        moved = [logits.copy(), logits.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        up, down = (np.sum(reference_gates(config, z, tau) * weights) for z in moved)
        expected[place] = (up - down) / (2 * step)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_a_learned_threshold_gets_the_formulas_gradient(rng):
    config = MoeLoraConfig(num_experts=EXPERTS, threshold=0.4, adaptive_threshold=True, norm_topk_prob=False)
    logits = rng.normal(0, 1, (TOKENS, EXPERTS)).astype(np.float32)
    tau = np.full(TOKENS, 0.15)
    usable = away_from_edges(config, logits, tau)
    logits, tau = logits[usable], tau[usable]
    found = jax.grad(lambda t: jnp.sum(gates_of(config, logits, t)))(jnp.asarray(tau, jnp.float32))
    kept = (reference_gates(config, logits, tau) > 0).sum(axis=-1)
    np.testing.assert_allclose(found, -kept.astype(float))  # each kept gate is p - tau


@pytest.mark.parametrize("config", CONFIGS[::6])
def test_leading_axes_do_not_matter(config, rng):
    logits = rng.normal(0, 2, (6, EXPERTS)).astype(np.float32)
    tau = thresholds(config, rng, 6)
    flat = gates_of(config, logits, tau)
    gating = Gating.of(config, config.for_module("m"))
    if tau is not None:
        tau = jnp.asarray(tau, jnp.float32).reshape(2, 3, 1) if config.adaptive_threshold else config.threshold
    stacked = route(jnp.asarray(logits).reshape(2, 3, EXPERTS), gating, tau)
    np.testing.assert_array_equal(stacked.gates.reshape(6, EXPERTS), flat)


# --- ties -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring", ["softmax", "abs_softmax", "sigmoid"])
@pytest.mark.parametrize("value", [0.0, -3.5, 1e4])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_equal_logits_keep_the_lowest_indices(scoring, value, k):
    config = MoeLoraConfig(num_experts=EXPERTS, top_k=k, scoring_func=scoring)
    gates = np.asarray(gates_of(config, np.full((3, EXPERTS), value)))
    assert ((gates > 0) == (np.arange(EXPERTS) < k)).all()
    np.testing.assert_allclose(gates[:, :k], 1 / k, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_ties_of_bf16_logits_keep_the_lower_index(rng, k):
    logits = rng.normal(0, 1, (5000, 8)).astype(ml_dtypes.bfloat16).astype(np.float32)
    order = np.argsort(-logits, axis=-1, kind="stable")
    tied = np.take_along_axis(logits, order[:, k - 1 : k], 1) == np.take_along_axis(logits, order[:, k : k + 1], 1)
    assert tied.sum() > 5  # the case occurs
    expected = np.zeros(logits.shape, bool)
    np.put_along_axis(expected, order[:, :k], True, axis=-1)
    config = MoeLoraConfig(num_experts=8, top_k=k)
    np.testing.assert_array_equal(np.asarray(gates_of(config, logits)) > 0, expected)


@settings(max_examples=100, deadline=None)
@given(
    st_numpy.arrays(np.float32, (4, 6), elements=st.sampled_from([-2.0, -0.0, 0.0, 0.5, 0.5, 3.0])),
    st.sampled_from([1, 2, 5]),
)
def test_the_kept_experts_are_the_first_of_a_stable_descending_order(z, k):
    order = np.argsort(-z, axis=-1, kind="stable")  # 0 and -0 are equal
    expected = np.zeros(z.shape, bool)
    np.put_along_axis(expected, order[:, :k], True, axis=-1)
    found = np.asarray(gates_of(MoeLoraConfig(num_experts=6, top_k=k), z))
    np.testing.assert_array_equal(found > 0, expected)


@pytest.mark.parametrize("k", [1, 2, EXPERTS])
def test_sparsemax_of_equal_logits_is_equal_and_of_one_expert_one(k):
    """Also where an expert is exactly at t: its weight is 0, and it gets no gradient."""
    z = jnp.where(jnp.arange(EXPERTS) < k, 2.0, 1.0) if k < EXPERTS else jnp.full(EXPERTS, -3.0)
    found, jacobian = sparsemax(z), jax.jacobian(sparsemax)(z)
    first = (np.arange(EXPERTS) < k).astype(np.float32)
    np.testing.assert_allclose(found, first / k, atol=1e-7)
    np.testing.assert_allclose(jacobian, np.diag(first) - np.outer(first, first) / k, atol=1e-7)
    assert sparsemax(jnp.ones((3, 1))).tolist() == [[1.0]] * 3
    assert jax.grad(lambda z: sparsemax(z).sum())(jnp.ones(1)) == 0


def test_sparsemax_hands_on_what_is_no_number():
    assert np.isnan(sparsemax(jnp.array([jnp.nan, 0.0, 1.0]))).all()


def test_an_expert_at_the_threshold_is_kept():
    config = MoeLoraConfig(num_experts=4, threshold=0.25)
    np.testing.assert_array_equal(gates_of(config, np.zeros((2, 4)), np.full(2, 0.25)), np.full((2, 4), 0.25))


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.values[0].threshold is not None])
def test_nothing_kept_gives_zeros_and_zero_gradients(config):
    logits = np.linspace(-0.1, 0.1, EXPERTS)[None].repeat(3, 0)
    config = MoeLoraConfig(**{**config.to_dict(), "threshold": 1.0})
    tau = np.ones(3)
    total = lambda z: jnp.sum(gates_of(config, z, tau) ** 2 + 3 * gates_of(config, z, tau))  # noqa: E731
    value, gradient = jax.value_and_grad(total)(jnp.asarray(logits, jnp.float32))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((3, EXPERTS)))
    if config.adaptive_threshold:
        by_tau = jax.grad(lambda t: jnp.sum(gates_of(config, logits, t)))(jnp.ones(3))
        np.testing.assert_array_equal(by_tau, np.zeros(3))


@pytest.mark.parametrize("scoring", ["softmax", "abs_softmax", "sigmoid"])
def test_renormalised_top_1_is_one_with_an_exactly_zero_gradient(scoring, rng):
    config = MoeLoraConfig(num_experts=EXPERTS, top_k=1, scoring_func=scoring)
    logits = jnp.asarray(rng.normal(0, 2, (1000, EXPERTS)), jnp.float32)
    weights = rng.normal(size=logits.shape)
    gates, pull = jax.vjp(lambda z: gates_of(config, z), logits)
    np.testing.assert_array_equal(np.max(gates, axis=-1), np.ones(1000))
    np.testing.assert_array_equal(np.sum(gates, axis=-1), np.ones(1000))
    np.testing.assert_array_equal(pull(jnp.asarray(weights, jnp.float32))[0], np.zeros(logits.shape))


EXTREME = [
    [1e4, -1e4, 0, 1e4, -1e4],
    [-1e4] * 5,
    [1e4] * 5,
    [0, 0, 0, 0, 1e4],
    [-1e4, -1e4, -1e4, -1e4, 0],
    [1e4, 9999, 9998, -1e4, 0],
    [3e38, -3e38, 0, 1, 2],
    [1e-40, -1e-40, 0, -0.0, 1e-45],
]


@pytest.mark.parametrize("config", CONFIGS)
def test_extreme_logits_give_finite_gates_and_gradients(config):
    logits = np.array(EXTREME, np.float32)
    tau = None if config.threshold is None else np.full(len(logits), config.threshold)
    weights = jnp.arange(1.0, 6.0) / 100  # the sum of signed scores must not overflow
    value, gradient = jax.value_and_grad(lambda z: jnp.sum(gates_of(config, z, tau) * weights))(jnp.asarray(logits))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    gates = np.asarray(gates_of(config, logits, tau))
    assert (gates >= 0).all() or config.scoring_func == "identity"
    if config.norm_topk_prob and config.scoring_func != "sigmoid":
        total = gates.sum(axis=-1)
        at_least_one_kept = gates.any(axis=-1)
        np.testing.assert_allclose(total[at_least_one_kept], 1, rtol=1e-6)
        assert at_least_one_kept.all() or config.threshold is not None


def test_an_expert_much_less_likely_than_the_kept_one_still_gets_its_share():
    config = MoeLoraConfig(num_experts=3, top_k=2)  # softmax over all would underflow to 0 / 0 for the third
    gates = gates_of(config, [[0.0, -200.0, -200.5]])
    np.testing.assert_array_equal(gates, [[1, 0, 0]])
    close = gates_of(config, [[-1e4, -1e4 - 1, -2e4]])
    np.testing.assert_allclose(close, [[1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0]], rtol=1e-6)


def test_gates_do_not_depend_on_a_common_shift(rng):
    config = MoeLoraConfig(num_experts=EXPERTS, top_k=2)
    logits = (rng.integers(-64, 64, (TOKENS, EXPERTS)) / 16).astype(np.float32)  # sums with 256 are exact
    np.testing.assert_array_equal(gates_of(config, logits), gates_of(config, logits + 256))


@pytest.mark.parametrize("config", CONFIGS[::5])
def test_jit_gives_the_same_selection(config, rng):
    logits = rng.normal(0, 2, (TOKENS, EXPERTS)).astype(np.float32)
    tau = thresholds(config, rng, TOKENS)
    plain = np.asarray(gates_of(config, logits, tau))
    compiled = np.asarray(jax.jit(lambda z: gates_of(config, z, tau))(logits))
    usable = away_from_edges(config, logits, tau)
    np.testing.assert_allclose(compiled[usable], plain[usable], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(compiled[usable] > 0, plain[usable] > 0)
