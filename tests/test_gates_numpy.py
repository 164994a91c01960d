"""The decisions of JAX, PyTorch and the plain numpy gates against the formula, and the gates of tasks."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import moe_lora_interop
from moe_lora_interop.export.task_gates import compute_gates, task_gates
from moe_lora_interop.peft_tuner.gating import route as torch_route
from moe_lora_jax.layers.gating import Gating, route
from tests.adapters import make_adapter
from tests.numpy_mixture import decide
from tests.peers_data import Peer

MORE = (
    {"top_k": 1, "top_p": 0.6},
    {"top_k": 2, "top_p": 0.9, "entropy_threshold": 0.7, "entropy_index": 2.0, "entropy_eps": 1e-3},
    {"top_k": 1, "entropy_threshold": 0.5},
)
RULES = st.fixed_dictionaries(
    {
        "scoring_func": st.sampled_from(["softmax", "abs_softmax", "sigmoid", "identity", "sparsemax"]),
        "select": st.sampled_from([{}, {"top_k": 1}, {"top_k": 3}, {"threshold": 0.3}, {"threshold": 0.9}, *MORE]),
        "adaptive_threshold": st.booleans(),
        "norm_topk_prob": st.booleans(),
        "routed_scaling_factor": st.sampled_from([1.0, 0.3, 2.5]),
    }
)


@settings(max_examples=60, deadline=None)
@given(RULES, st.integers(0, 2**32 - 1))
def test_every_decision_is_the_formulas(rule, seed):
    select = rule.pop("select")
    rule["adaptive_threshold"] &= "threshold" in select
    if rule["scoring_func"] == "identity":
        assume("threshold" not in select)
        rule["norm_topk_prob"] = False
    elif not select and rule["scoring_func"] != "sigmoid":
        rule["norm_topk_prob"] = True
    assume(select not in MORE or "softmax" in rule["scoring_func"])
    config = moe_lora_interop.MoeLoraConfig(num_experts=4, **rule, **select)
    rng = np.random.default_rng(seed)
    z = rng.integers(-3, 4, (7, 4)).astype(np.float32)  # with ties
    if select in MORE:  # a tie may straddle the sum, where the last bit decides
        z += rng.normal(size=z.shape).astype(np.float32)
    tau = rng.uniform(0, 0.6, (7, 1)).astype(np.float32) if config.adaptive_threshold else config.threshold
    z64, taus = z.astype(np.float64), np.broadcast_to(np.nan if tau is None else tau, (7, 1))[:, 0]
    rows = [decide(row, config, config.top_k, None if tau is None else t) for row, t in zip(z64, taus, strict=True)]
    scores, kept, gates = (np.stack(field) for field in zip(*rows, strict=True))
    if tau is not None:  # nearer, fp32 may rightly decide otherwise
        assume(np.abs(scores - taus[:, None]).min() > 1e-6)
    ours = route(jnp.asarray(z), Gating.of(config, config.for_module("x")), tau)
    torch_tau = torch.from_numpy(tau) if config.adaptive_threshold else tau
    theirs = torch_route(torch.from_numpy(z), config, config.top_k, torch_tau)
    for found in (ours, theirs):
        np.testing.assert_array_equal(found.logits, z)
        np.testing.assert_allclose(found.scores, scores, atol=1e-6)
        np.testing.assert_array_equal(found.kept, kept)
        np.testing.assert_allclose(found.gates, gates, atol=1e-6)
    exported = compute_gates(z64, config, config.top_k, tau)
    np.testing.assert_allclose(exported, config.routed_scaling_factor * gates, atol=1e-12)


def test_the_formula_by_hand():
    config = moe_lora_interop.MoeLoraConfig(num_experts=3, top_k=2)
    weights = np.exp([2.0, 1.0])
    expected = [weights[0] / weights.sum(), 0, weights[1] / weights.sum()]
    np.testing.assert_allclose(compute_gates(np.array([2.0, -1.0, 1.0]), config, 2), expected)
    assert np.isfinite(compute_gates(np.array([1e4, -1e4, 0.0]), config, None)).all()


def test_a_task_needs_an_adapter_that_routes_by_task():
    with pytest.raises(moe_lora_interop.ConfigError, match="the gates depend on the input"):
        task_gates(make_adapter(), [0])


def test_task_ids_must_be_in_the_table():
    peer = Peer("poly/poly")
    adapter = moe_lora_interop.read(peer.directory, **peer.options)
    tasks = adapter.config.num_tasks
    with pytest.raises(moe_lora_interop.ConfigError) as error:
        task_gates(adapter, [-1, tasks])
    assert error.value.problems == tuple(f"task: found {i}, expected an id from 0 to {tasks - 1}" for i in (-1, tasks))
    with pytest.raises(moe_lora_interop.ConfigError, match="found no id"):
        task_gates(adapter, [])


def test_ids_that_all_mean_none_give_a_zero_row():
    peer = Peer("moelora/adapter")
    adapter = moe_lora_interop.read(peer.directory, **peer.options)
    gates = task_gates(adapter, [0, 0])
    experts = adapter.config.num_experts
    assert gates.keys() == set(adapter.modules)
    np.testing.assert_allclose(gates[adapter.modules[0]], np.full((1, experts), 1 / experts))
