"""Router health against numpy, and the warnings."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_lora_jax import MoeLoraConfig, RouterOutput
from moe_lora_jax.train.health import CollapseWatch, ModuleHealth, RouterSums, module_health, router_sums

MASK = np.array([[1, 1, 1, 0], [0, 1, 1, 1]])


def test_statistics_equal_numpy_and_leave_padding_out():
    gates = np.random.default_rng(0).random((2, 4, 3)).astype(np.float32)
    gates[0, 0] = [0, 0, 2]  # weights need not sum to 1
    gates[0, 1] = 0  # nor be there at all
    gates[1, 1] = [-1, 2, -3]  # nor be positive: an expert counts by how much it adds
    router = {"m": RouterOutput(*[jnp.asarray(gates)] * 4)}
    health = module_health(router_sums(router, jnp.asarray(MASK)))["m"]
    gates = np.abs(gates)
    total = gates.sum(-1, keepdims=True)
    share = np.divide(gates, total, out=np.zeros_like(gates), where=total > 0)[MASK > 0]
    entropy = -np.sum(np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0), axis=-1)
    np.testing.assert_allclose(health.shares, share.sum(0) / share.sum(), rtol=1e-6)
    np.testing.assert_allclose(health.entropy, entropy.mean() / np.log(3), rtol=1e-6)
    assert health.largest_share == health.shares.max()


def test_sums_add_up_over_batches():
    rng = np.random.default_rng(1)
    router = {"m": RouterOutput(*[jnp.asarray(rng.random((2, 4, 3)), jnp.float32)] * 4)}
    whole = router_sums(router, jnp.asarray(MASK))["m"]
    rows = [
        router_sums({"m": RouterOutput(*(x[i : i + 1] for x in router["m"]))}, jnp.asarray(MASK[i : i + 1]))["m"]
        for i in range(2)
    ]
    for found, *parts in zip(whole, *rows, strict=True):
        np.testing.assert_allclose(found, sum(parts), rtol=1e-6)


def health(*shares: float) -> ModuleHealth:
    return ModuleHealth(np.array(shares) / sum(shares), 0.5)


@pytest.mark.parametrize(
    ("shares", "top_k", "dead", "collapsed"),
    [
        ((1, 1, 1, 1), None, 0, False),
        ((97, 1, 1, 1), None, 0, True),  # one takes nearly everything
        ((1, 0, 0, 0), 2, 3, True),
        ((1, 1, 0, 0), 2, 2, True),  # only as many as each token must use
        ((1, 1, 0, 0), None, 2, False),
        ((4, 4, 1, 0), 2, 1, False),
        ((1, 1, 0.003, 0.003), 2, 2, True),  # less than 1% of an equal share is dead
        ((1, 1), 2, 0, False),
    ],
)
def test_dead_and_collapsed(shares, top_k, dead, collapsed):
    assert health(*shares).dead_experts == dead
    assert health(*shares).is_collapsed(top_k) == collapsed


def test_collapse_is_warned_of_once_per_module_in_one_line(caplog):
    watch = CollapseWatch(MoeLoraConfig(num_experts=4, top_k=2, target_modules=["a", "b", "c"]))
    fine, bad, worse = health(1, 1, 1, 1), health(3, 1, 0, 0), health(1, 0, 0, 0)
    watch.check(10, {"a": fine, "b": fine, "c": fine})
    assert not caplog.records
    watch.check(20, {"a": fine, "b": bad, "c": worse})
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.name.startswith("moe_lora_jax")
    message = record.getMessage()
    assert "\n" not in message
    assert "step 20: routing collapsed in 2 of 3 modules (worst: c, one expert takes 100%, 3 of 4 are dead)" in message
    watch.check(30, {"a": fine, "b": bad, "c": worse})
    assert len(caplog.records) == 1
    watch.check(40, {"a": bad, "b": bad, "c": worse})
    assert "in 1 of 3 modules (worst: a" in caplog.records[1].getMessage()


def test_a_window_without_tokens_is_no_collapse_and_no_error():
    zeros = RouterSums(np.zeros(3), np.float32(0), np.float32(0))
    assert np.all(np.isfinite(module_health({"m": zeros})["m"].shares))
