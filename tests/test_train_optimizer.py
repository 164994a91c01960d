"""The schedule and AdamW against formulas written out in numpy, and against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_lora_jax.train.optimizer import adamw, warmup_cosine


def test_schedule_is_linear_then_cosine():
    schedule = warmup_cosine(0.1, 4, 20)
    expected = [0.1 * (i + 1) / 4 for i in range(4)]
    expected += [0.1 * 0.5 * (1 + np.cos(np.pi * (i - 4) / 16)) for i in range(4, 20)]
    np.testing.assert_allclose([schedule(i) for i in range(20)], expected, rtol=1e-5)
    assert all(rate > 0 for rate in expected)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 5), (1, 1), (5, 5), (9, 5)])
def test_schedule_is_finite_and_bounded_whatever_the_sizes(warmup, total):
    rates = np.array([warmup_cosine(0.1, warmup, total)(i) for i in range(total)])
    assert np.all(np.isfinite(rates)) and np.all(rates > 0) and np.all(rates <= 0.1 + 1e-8)


def numpy_adamw(params, gradients, rates, weight_decay, clip):
    p, m, v = params.copy(), np.zeros_like(params), np.zeros_like(params)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = np.sqrt(np.sum(g**2))
        g = g * min(1.0, clip / norm)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + weight_decay * p)
    return p


def test_five_steps_equal_numpy_on_a_split_tree():
    rng = np.random.default_rng(0)
    params, gradients = rng.normal(size=10), rng.normal(size=(5, 10))
    schedule = warmup_cosine(0.01, 2, 5)
    optimizer = adamw(schedule, weight_decay=0.1, max_grad_norm=1.5)

    def tree(flat):
        return {"a": jnp.asarray(flat[:4].reshape(2, 2), jnp.float32), "b": [jnp.asarray(flat[4:], jnp.float32)]}

    found, state = tree(params), optimizer.init(tree(params))
    for g in gradients:
        updates, state = optimizer.update(tree(g), state, found)
        found = optax.apply_updates(found, updates)
    flat = np.concatenate([np.ravel(found["a"]), np.ravel(found["b"][0])])
    expected = numpy_adamw(params, gradients, [float(schedule(i)) for i in range(5)], 0.1, 1.5)
    np.testing.assert_allclose(flat, expected, rtol=1e-5)


def test_five_steps_equal_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    params, gradients = rng.normal(size=6).astype(np.float32), rng.normal(size=(5, 6)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(params))
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    optimizer = adamw(optax.constant_schedule(0.01), weight_decay=0.1, max_grad_norm=None)
    ours, state = jnp.asarray(params), optimizer.init(jnp.asarray(params))
    for g in gradients:
        theirs.grad = torch.tensor(g)
        reference.step()
        updates, state = optimizer.update(jnp.asarray(g), state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5)


def test_only_a_large_gradient_is_clipped():
    optimizer = adamw(optax.constant_schedule(1.0), weight_decay=0.0, max_grad_norm=1.0)
    state = optimizer.init(jnp.zeros(2))
    for size, expected in ((0.5, 0.5), (10.0, 1.0)):
        _, new = optimizer.update(jnp.array([size, 0.0]), state, jnp.zeros(2))
        moment = jax.tree.leaves(optax.tree.get(new, "mu"))[0]
        np.testing.assert_allclose(moment[0], 0.1 * expected, rtol=1e-6)
