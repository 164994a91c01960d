"""Layers as one scan, and rematerialised: the same values, gradients, router outputs and files as the plain loop."""

from collections import Counter
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_training import LLAMA

import moe_lora_jax as mlj
from moe_lora_jax.models import load_base_model
from moe_lora_jax.models.remat import KEPT, OFFLOADED, Remat
from tests.hf import VOCAB, Saved

SWITCHES = {
    "scan": dict(scan_layers=True, remat="none"),
    "remat": dict(remat="full"),
    "scan_remat": dict(scan_layers=True),
    "scan_policy": dict(scan_layers=True, remat="minimal"),
}
SIZES = {**LLAMA, "num_hidden_layers": 2}
ADAPTERS = {
    "linear": dict(top_k=2),
    "ffn": dict(top_k=2, scope="ffn", target_modules=["gate_proj", "up_proj", "down_proj"]),
    "model": dict(scope="model"),
    "task": dict(router_input="task", num_tasks=2, router_depth=0),
    "temperature": dict(scoring_func="sparsemax", temperature_hidden_size=4, router_jitter_noise=0.1),
    "random": dict(lora_dropout=0.3, router_jitter_noise=0.1, expert_dropout=0.1),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory)


def load(saved, case, adapter=None, **switches):
    model = load_base_model(saved(case)[1], **switches)
    if adapter is not None:
        fields = {"target_modules": "all-linear", **adapter}
        config = mlj.MoeLoraConfig(r=2, num_experts=3, init_lora_weights=False, **fields)
        mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(0))
        model.train()
    return model


def arguments(model):
    ids = np.random.default_rng(0).integers(3, VOCAB, (2, 12))
    mask = np.ones_like(ids)
    mask[1, -4:] = 0
    task = getattr(model, "moe_lora_config", None) and model.moe_lora_config.router_input == "task"
    return (ids, mask), ({"task_ids": np.array([0, 1])} if task else {})


def outcome(model):
    """Logits, router outputs, gradients of the adapter, and the RNG state afterwards, twice in a row."""
    (ids, mask), extra = arguments(model)
    graph, adapter, rng, rest = nnx.split(model, mlj.MoeLoraParam, nnx.RngState, ...)

    @jax.jit
    def run(adapter, rng, rest):
        def loss(adapter, rng, rest):
            copy = nnx.merge(graph, adapter, rng, rest, copy=True)
            logits, router = copy(ids, mask, return_router=True, **extra)
            total = jnp.sum(jnp.sin(logits[:, :8])) + sum(jnp.sum(out.logits**2) for out in router.values())
            return total, (logits, router, nnx.state(copy, nnx.RngState))

        return jax.grad(loss, has_aux=True)(adapter, rng, rest)

    grads, (logits, router, rng) = run(adapter, rng, rest)
    again, (second, _, rng) = run(adapter, rng, rest)
    return {"grads": grads, "logits": logits, "router": router, "again": again, "second": second}, rng


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert len(jax.tree.leaves(found)) > 0
    for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(f, w, rtol=0, atol=2e-5 * max(abs(np.asarray(w)).max(), 1e-3))


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_switches_change_nothing(adapter, switches, saved, tmp_path):
    plain, switched = (load(saved, "llama", ADAPTERS[adapter], **s) for s in ({}, SWITCHES[switches]))
    (wanted, wanted_rng), (found, found_rng) = outcome(plain), outcome(switched)
    assert_same(found, wanted)
    for f, w in zip(jax.tree.leaves(found_rng), jax.tree.leaves(wanted_rng), strict=True):
        as_data = [jax.random.key_data(a) if a.dtype.name.startswith("key") else a for a in (f, w)]
        np.testing.assert_array_equal(*as_data)
    if adapter == "random":  # each layer and each call draws for itself
        assert abs(np.asarray(found["logits"] - found["second"])).max() > 1e-3
    for name, model in (("plain", plain), ("switched", switched)):
        mlj.save_pretrained(model, tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "switched").iterdir())
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "switched" / name).read_bytes()


@pytest.fixture(scope="module")
def plain(saved):
    return {name: outcome(load(saved, "llama", ADAPTERS[name]))[0] for name in ("linear", "ffn")}


@pytest.mark.parametrize("adapter", ["linear", "ffn"])
@pytest.mark.parametrize("policy", [name for name in get_args(Remat) if name not in ("none", "full")])
def test_every_policy_gives_the_same_gradients(policy, adapter, plain, saved):
    assert_same(outcome(load(saved, "llama", ADAPTERS[adapter], scan_layers=True, remat=policy))[0], plain[adapter])


def residuals(remat: str, **adapter) -> Counter:
    """{where: how many numbers the forward scan leaves there for the backward one}."""
    model = mlj.abstract_base_model(SIZES, dtype="float32", scan_layers=True, remat=remat)
    fields = {"target_modules": "all-linear", **adapter}
    mlj.apply_moe_lora(model, mlj.MoeLoraConfig(r=2, num_experts=3, top_k=2, **fields), rngs=nnx.Rngs(0))
    graph, adapter, rest = nnx.split(model, mlj.MoeLoraParam, ...)
    loss = lambda adapter, rest, ids: jnp.sum(nnx.merge(graph, adapter, rest, copy=True)(ids) ** 2)  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapter, rest, jax.ShapeDtypeStruct((2, 12), jnp.int32))
    _, *left = next(e for e in jaxpr.eqns if e.primitive.name == "scan").outvars
    found: Counter = Counter()
    for variable in left:
        found["host" if "<host>" in variable.aval.str_short() else "device"] += variable.aval.size
    return found


WIDTHS = {
    "query_proj": 32,
    "key_proj": 16,
    "value_proj": 16,
    "context": 32,
    "out_proj": 32,
    "mlpwi_0": 48,
    "mlpwi_1": 48,
}
WIDTHS |= {"mlpwo": 0}  # what is only added to the next layer's input has no use backwards


def test_a_policy_keeps_what_it_says():
    tokens, layers, hidden = 2 * 12, 2, 32
    for policy, names in {**KEPT, **OFFLOADED}.items():
        expected = Counter(device=tokens * layers * hidden)  # the layers' inputs
        expected["host" if policy in OFFLOADED else "device"] += tokens * layers * sum(WIDTHS[name] for name in names)
        assert residuals(policy) == expected, policy
    assert sum(residuals("none").values()) > sum(residuals("minimal_with_context").values())


def test_an_expert_block_keeps_what_each_of_its_runs_gives():
    """top_k 2: two slots of gate and up each."""
    ffn = {"scope": "ffn", "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    kept = {policy: residuals(policy, **ffn)["device"] for policy in ("save_dot_except_mlp", "minimal")}
    assert kept["minimal"] - kept["save_dot_except_mlp"] == 2 * 12 * 2 * 2 * (48 + 48)


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "qwen2", "mistral"])  # windows and rotations that differ by layer
def test_layers_with_windows_and_rotations_of_their_own(case, saved):
    ids = np.random.default_rng(0).integers(3, VOCAB, (2, 24))
    positions = np.arange(24)[None] + np.array([[0], [3]])
    wanted = load(saved, case)(ids, positions=positions)
    for switches in SWITCHES.values():
        assert_same(load(saved, case, **switches)(ids, positions=positions), wanted)


def test_generation_does_not_notice(saved):
    ids = np.random.default_rng(0).integers(3, VOCAB, (2, 5))
    plain, switched = (load(saved, "llama", dict(scope="model"), **s) for s in ({}, SWITCHES["scan_remat"]))
    np.testing.assert_array_equal(*(mlj.generate(m, ids, max_new_tokens=4) for m in (plain, switched)))


def program(model):
    (ids, mask), _ = arguments(model)
    graph, adapter, rest = nnx.split(model, mlj.MoeLoraParam, ...)
    loss = lambda adapter, rest: jnp.sum(nnx.merge(graph, adapter, rest, copy=True)(ids, mask) ** 2)  # noqa: E731
    return jax.make_jaxpr(jax.grad(loss))(adapter, rest)


def test_a_scan_holds_the_layer_once(saved):
    jaxpr = program(load(saved, "llama", ADAPTERS["linear"], scan_layers=True))
    inside = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert [e.params["length"] for e in inside] == [2, 2]  # forwards and backwards
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert len(products) == 2  # the head's, both ways


def test_what_cannot_be_scanned_is_refused(saved):
    ids = np.ones((1, 4), int)
    uneven = load(saved, "llama", dict(target_modules=["model.layers.1.self_attn.q_proj"]), scan_layers=True)
    with pytest.raises(ValueError, match="scan_layers: found layer 1 unlike layer 0"):
        uneven(ids)
    ranks = load(saved, "llama", dict(rank_pattern={r".*layers\.1\..*": 4}), scan_layers=True)
    with pytest.raises(ValueError, match="scan_layers: found layer 1 unlike layer 0"):
        ranks(ids)
    for wrong in ("everything", True):
        with pytest.raises(
            ValueError, match=f"remat: found {wrong!r}, expected None or one of none, full, save_out_proj"
        ):
            load_base_model(saved("llama")[1], remat=wrong)
