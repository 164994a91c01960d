"""Losses against plain numpy, and against transformers' own function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_lora_jax import MoeLoraConfig, RouterOutput
from moe_lora_jax.layers.gating import Gating, route
from moe_lora_jax.train.losses import load_balancing_loss, next_token_loss, router_z_loss

BATCH, SEQ, EXPERTS = 3, 7, 5
rng = np.random.default_rng(0)


def config_of(**fields) -> MoeLoraConfig:
    return MoeLoraConfig(**{"num_experts": EXPERTS, "target_modules": ["m0", "m1"], **fields})


def decided(config: MoeLoraConfig, logits: np.ndarray, module: str = "m0") -> RouterOutput:
    return route(jnp.asarray(logits, jnp.float32), Gating.of(config, config.for_module(module)), config.threshold)


def router_of(config: MoeLoraConfig, modules: int = 2, seed: int = 1) -> dict[str, RouterOutput]:
    logits = [2 * np.random.default_rng(seed + i).normal(size=(BATCH, SEQ, EXPERTS)) for i in range(modules)]
    return {f"m{i}": decided(config, z, f"m{i}") for i, z in enumerate(logits)}


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


MASK = np.ones((BATCH, SEQ), np.int32)
MASK[0, 4:] = 0
MASK[2, :3] = 0


def test_next_token_loss_is_the_mean_over_counted_tokens():
    logits = rng.normal(size=(BATCH, SEQ, 11)).astype(np.float32)
    ids = rng.integers(0, 11, (BATCH, SEQ))
    counted = rng.random((BATCH, SEQ)) < 0.6
    counted[:, 0] = True  # has no prediction, so it must not count
    losses = [
        -np.log(softmax(logits[b, t - 1].astype(np.float64))[ids[b, t]])
        for b in range(BATCH)
        for t in range(1, SEQ)
        if counted[b, t]
    ]
    mean, count = next_token_loss(jnp.asarray(logits), jnp.asarray(ids), jnp.asarray(counted))
    assert count == len(losses)
    np.testing.assert_allclose(mean, np.mean(losses), rtol=1e-6)


def test_next_token_loss_of_bfloat16_logits_is_computed_in_float32():
    logits = jnp.asarray(rng.normal(size=(1, 4, 9)), jnp.bfloat16)
    ids, counted = jnp.asarray([[1, 2, 3, 4]]), jnp.ones((1, 4), bool)
    mean, _ = next_token_loss(logits, ids, counted)
    expected, _ = next_token_loss(logits.astype(jnp.float32), ids, counted)
    assert mean.dtype == jnp.float32
    assert mean == expected


def test_the_gradient_of_next_token_loss_is_softmax_minus_one_at_the_target():
    """(softmax(z_t-1) - onehot(id_t)) / count where token t counts, exactly 0 elsewhere."""
    logits = rng.normal(size=(BATCH, SEQ, 11)).astype(np.float32)
    ids = rng.integers(0, 11, (BATCH, SEQ))
    counted = rng.random((BATCH, SEQ)) < 0.6
    counted[0], counted[1, -1] = False, True  # a row without targets; a target in the last column
    ids[2, 3], counted[2, 3] = 99, False  # padding may have any id
    expected = np.zeros_like(logits)
    for b, t in zip(*np.nonzero(counted[:, 1:]), strict=True):
        expected[b, t] = softmax(logits[b, t].astype(np.float64)) - np.eye(11)[ids[b, t + 1]]
    expected /= counted[:, 1:].sum()
    gradient = jax.grad(lambda z: next_token_loss(z, jnp.asarray(ids), jnp.asarray(counted)).mean)(jnp.asarray(logits))
    np.testing.assert_allclose(gradient, expected, atol=1e-7)
    assert not np.any(np.asarray(gradient)[expected == 0])


def test_next_token_loss_of_a_target_outside_the_vocabulary_is_nan():
    logits, counted = jnp.zeros((1, 3, 4)), jnp.ones((1, 3), bool)
    for ids in ([[0, 4, 1]], [[0, -1, 1]]):
        assert np.isnan(next_token_loss(logits, jnp.asarray(ids), counted).mean)


def test_next_token_loss_of_nothing_is_zero_with_zero_gradient():
    ids, nothing = jnp.zeros((1, 3), int), jnp.zeros((1, 3), bool)
    logits = jnp.asarray(rng.normal(size=(1, 3, 4)), jnp.float32)
    value, gradient = jax.value_and_grad(lambda x: next_token_loss(x, ids, nothing).mean)(logits)
    assert value == 0
    assert not np.any(gradient)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_balancing_of_one_module_equals_transformers(top_k, masked):
    torch = pytest.importorskip("torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = config_of(top_k=top_k)
    router = router_of(config, modules=1)
    logits = torch.tensor(np.array(router["m0"].logits)).reshape(-1, EXPERTS)
    mask = torch.tensor(MASK) if masked else None
    expected = load_balancing_loss_func((logits,), EXPERTS, top_k, mask)
    found = load_balancing_loss(router, config, jnp.asarray(MASK) if masked else None)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 2},
        {"top_k": 2, "norm_topk_prob": False},
        {},
        {"threshold": 0.2},
        {"scoring_func": "sigmoid", "top_k": 2},
        {"scoring_func": "sigmoid"},
        {"scoring_func": "abs_softmax", "top_k": 2},
    ],
    ids=str,
)
def test_load_balancing_equals_numpy(fields):
    config = config_of(**fields)
    router = router_of(config)
    real, losses = MASK.astype(bool), []
    for out in router.values():
        z, g = np.asarray(out.logits, np.float64)[real], np.asarray(out.gates, np.float64)[real]
        scores = {"softmax": lambda z: softmax(z), "abs_softmax": lambda z: softmax(np.abs(z))}.get(
            config.scoring_func, lambda z: 1 / (1 + np.exp(-z))
        )(z)
        probability = (scores / scores.sum(-1, keepdims=True)).mean(0)
        if config.top_k is None:
            fraction = g.mean(0)
        else:
            chosen = np.argsort(-scores, axis=-1, kind="stable")[:, : config.top_k]
            fraction = np.bincount(chosen.ravel(), minlength=EXPERTS) / len(z)
            assert np.isclose(fraction.sum(), config.top_k)
        losses.append(EXPERTS * np.sum(fraction * probability))
    np.testing.assert_allclose(load_balancing_loss(router, config, jnp.asarray(MASK)), np.mean(losses), rtol=1e-6)


def test_load_balancing_takes_each_modules_own_top_k():
    config = config_of(top_k=2, top_k_pattern={"m1": 3})
    router = router_of(config)
    each = [load_balancing_loss({name: router[name]}, config_of(top_k=k)) for name, k in (("m0", 2), ("m1", 3))]
    np.testing.assert_allclose(load_balancing_loss(router, config), np.mean(each), rtol=1e-6)


def test_equal_use_gives_the_smallest_loss_which_is_top_k():
    config = config_of(top_k=2)
    logits = jnp.asarray([[np.roll([2.0, 1.0, 0, 0, 0], i) for i in range(EXPERTS)]], jnp.float32)
    balanced = load_balancing_loss({"m0": decided(config, logits)}, config)
    np.testing.assert_allclose(balanced, 2.0, rtol=1e-6)


def test_padding_tokens_change_nothing():
    config = config_of(top_k=2, router_z_loss_coef=1.0)
    router = router_of(config, modules=1)
    noise = jnp.where(jnp.asarray(MASK)[..., None] > 0, router["m0"].logits, 100.0)
    disturbed = {"m0": decided(config, noise)}
    mask = jnp.asarray(MASK)
    assert load_balancing_loss(router, config, mask) == load_balancing_loss(disturbed, config, mask)
    assert router_z_loss(router, mask) == router_z_loss(disturbed, mask)


def test_gradient_of_top_k_balancing_equals_finite_differences():
    config = config_of(top_k=2)
    logits = np.asarray(router_of(config, modules=1)["m0"].logits, np.float64)

    def loss(z: np.ndarray) -> float:  # f stays, as the derivative says: it is piecewise constant
        p = softmax(z[MASK > 0])
        chosen = np.argsort(-p, axis=-1, kind="stable")[:, :2]
        return EXPERTS * np.sum(np.bincount(chosen.ravel(), minlength=EXPERTS) / len(p) * p.mean(0))

    found = jax.grad(lambda z: load_balancing_loss({"m0": decided(config, z)}, config, jnp.asarray(MASK)))(
        jnp.asarray(logits, jnp.float32)
    )
    for index in [(0, 1, 2), (1, 6, 0), (2, 4, 4), (0, 5, 1)]:
        step = np.zeros_like(logits)
        step[index] = 1e-5
        np.testing.assert_allclose(found[index], (loss(logits + step) - loss(logits - step)) / 2e-5, atol=1e-5)


def test_dense_balancing_has_a_gradient_through_the_gates():
    config = config_of()

    def loss(z, through_gates):
        out = decided(config, z)
        gates = out.gates if through_gates else jax.lax.stop_gradient(out.gates)
        return load_balancing_loss({"m0": out._replace(gates=gates)}, config)

    z = router_of(config, modules=1)["m0"].logits
    both, only_p = (jax.grad(loss)(z, flag) for flag in (True, False))
    np.testing.assert_allclose(both, 2 * only_p, rtol=1e-5, atol=1e-8)  # f = P, so each factor gives half


def test_z_loss_equals_numpy():
    router = router_of(config_of(top_k=2))
    logits = [np.asarray(out.logits, np.float64)[MASK > 0] for out in router.values()]
    terms = [np.mean(np.log(np.exp(z).sum(-1)) ** 2) for z in logits]
    np.testing.assert_allclose(router_z_loss(router, jnp.asarray(MASK)), np.mean(terms), rtol=1e-6)


def test_splits_are_averaged():
    config = config_of(scoring_func="sigmoid")
    one, other = router_of(config).values()
    both = RouterOutput(*(jnp.stack(pair, axis=2) for pair in zip(one, other, strict=True)))
    mask = jnp.asarray(MASK)
    for loss in (lambda r: load_balancing_loss(r, config, mask), lambda r: router_z_loss(r, mask)):
        expected = np.mean([loss({"m0": one}), loss({"m0": other})])
        np.testing.assert_allclose(loss({"m0": both}), expected, rtol=1e-6)


def test_the_scaling_factor_is_not_a_matter_of_balance():
    plain, scaled = config_of(), config_of(routed_scaling_factor=3.0)
    expected = load_balancing_loss(router_of(plain), plain)
    np.testing.assert_allclose(load_balancing_loss(router_of(scaled), scaled), expected, rtol=1e-6)


def test_without_routers_both_are_zero():
    assert load_balancing_loss({}, config_of(num_experts=1)) == 0
    assert router_z_loss({}) == 0


def test_the_pooled_loss_is_transformers_over_several_layers():
    torch = pytest.importorskip("torch", reason="the independent truth is transformers' function")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = rng.normal(size=(3, 2, 5, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    config = MoeLoraConfig(num_experts=4, top_k=2, router_aux_loss="mixtral")
    router = {f"m{i}": decided(config, z) for i, z in enumerate(logits)}
    expected = load_balancing_loss_func(tuple(torch.tensor(z.reshape(-1, 4)) for z in logits), 4, 2, torch.tensor(mask))
    np.testing.assert_allclose(load_balancing_loss(router, config, jnp.asarray(mask)), float(expected), rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_the_localized_loss_is_loramoes_formula(masked):
    gates = rng.dirichlet(np.ones(4), size=(2, 3, 5)).astype(np.float32)  # two modules, three samples
    mask = rng.integers(0, 2, (3, 5)) | (np.arange(5) == 0) if masked else np.ones((3, 5), int)
    types, delta = np.array([1, 0, 1]), 0.25
    expected = []
    for module in gates:
        weighted = []
        for sample, kind, real in zip(module, types, mask, strict=True):
            for expert in range(4):
                agrees = (kind == 1 and expert < 2) or (kind == 0 and expert >= 2)
                weighted.append((1 + delta if agrees else 1 - delta) * (sample[:, expert] * real).sum())
        expected.append(np.var(weighted, ddof=1) / (np.mean(weighted) ** 2 + 1e-10))
    router = {f"m{i}": RouterOutput(*[jnp.asarray(g)] * 4) for i, g in enumerate(gates)}
    config = MoeLoraConfig(num_experts=4, router_aux_loss="localized", router_aux_loss_delta=delta)
    found = load_balancing_loss(router, config, jnp.asarray(mask), task_types=jnp.asarray(types))
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)


def test_the_localized_loss_needs_types():
    router = {"m": RouterOutput(*[jnp.ones((1, 2, 2)) / 2] * 4)}
    with pytest.raises(ValueError, match="needs task_types"):
        load_balancing_loss(router, MoeLoraConfig(num_experts=2, router_aux_loss="localized"))
