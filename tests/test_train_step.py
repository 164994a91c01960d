"""The functional step: gradients, accumulation, dropout streams, what is frozen, what is donated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_training import MODULES, arrays, compiled_once, tiny_base, tiny_model, token_data  # noqa: F401

import moe_lora_jax as mlj
from moe_lora_jax.adapters.filters import PARTS, experts_only, router_only
from moe_lora_jax.train.batches import collate
from moe_lora_jax.train.evaluation import batch_loss, run_batches
from moe_lora_jax.train.optimizer import adamw
from moe_lora_jax.train.step import Batch, make_train_step, merge_back, split_model

pytestmark = pytest.mark.usefixtures("compiled_once")
SGD = optax.sgd(1.0)
LOSSES = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.2}


def batch_of(rows: int, micro: int = 1, seed: int = 0) -> Batch:
    batch, _ = collate(token_data(rows, seed).examples, rows, (24,), 0)
    return jax.tree.map(lambda x: x.reshape(micro, rows // micro, -1), batch)


def one_step(model, batch, optimizer=SGD, part="all"):
    """(new trainable arrays, metrics, old trainable arrays) of one step in train mode."""
    before = arrays(model, PARTS[part])
    model.train()
    graphdef, state, frozen = split_model(model, PARTS[part], optimizer)
    state, metrics = make_train_step(graphdef, optimizer, model.moe_lora_config)(state, frozen, batch)
    merge_back(model, state, frozen)
    model.eval()
    return arrays(model, PARTS[part]), metrics, before


def reference_loss(model, batch: Batch, config) -> float:
    """The training loss in numpy, from the model's outputs."""
    ids, mask, counted = (np.asarray(x[0]) for x in batch[:3])
    logits, router = model(jnp.asarray(ids), attention_mask=jnp.asarray(mask), return_router=True)
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = [-log_p[b, t - 1, ids[b, t]] for b in range(len(ids)) for t in range(1, ids.shape[1]) if counted[b, t]]
    balance, z_loss = [], []
    for output in router.values():
        z = np.asarray(output.logits, np.float64)[mask > 0]
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        chosen = np.argsort(-p, axis=-1, kind="stable")[:, : config.top_k]
        counts = np.bincount(chosen.ravel(), minlength=p.shape[1]) if config.top_k else p.sum(0)
        balance.append(p.shape[1] * np.sum(counts / len(p) * p.mean(0)))
        z_loss.append(np.mean(np.log(np.exp(z).sum(-1)) ** 2))
    return np.mean(nll) + config.router_aux_loss_coef * np.mean(balance) + config.router_z_loss_coef * np.mean(z_loss)


def test_loss_equals_numpy_with_both_auxiliary_terms():
    model = tiny_model(**LOSSES)
    batch = batch_of(4)
    expected = reference_loss(model, batch, model.moe_lora_config)
    _, metrics, _ = one_step(model, batch)
    np.testing.assert_allclose(metrics.loss, expected, rtol=1e-5)
    assert metrics.counted_tokens == batch.loss_mask[:, :, 1:].sum()
    assert metrics.tokens == batch.attention_mask.sum()
    assert metrics.lm_loss < metrics.loss


def test_gradients_equal_finite_differences():
    fields = {"top_k": None, **LOSSES}  # dense: smooth
    batch = batch_of(4)
    after, _, before = one_step(tiny_model(**fields), batch)
    paths = [f"model.layers.0.mlp.down_proj.{leaf}" for leaf in ("lora_a", "lora_b", "router.kernel")]
    for path in paths:
        gradient = before[path] - after[path]  # SGD with learning rate 1
        index = np.unravel_index(np.argmax(np.abs(gradient)), gradient.shape)
        losses = []
        for step in (1e-2, -1e-2):
            moved = tiny_model(**fields)
            state = nnx.state(moved, mlj.MoeLoraParam)
            flat = dict(nnx.to_flat_state(state))
            key = next(k for k in flat if ".".join(map(str, k)) == path)
            flat[key] = flat[key].replace(flat[key][...].at[index].add(step))
            nnx.update(moved, nnx.from_flat_state(flat))
            losses.append(reference_loss(moved, batch, moved.moe_lora_config))
        np.testing.assert_allclose(gradient[index], (losses[0] - losses[1]) / 2e-2, rtol=2e-2)


def test_accumulation_equals_the_joined_batch():
    fields = {"router_z_loss_coef": 0.1}
    joined, one, _ = one_step(tiny_model(**fields), batch_of(8))
    accumulated, many, before = one_step(tiny_model(**fields), batch_of(8, 4))
    np.testing.assert_allclose(many.loss, one.loss, rtol=1e-6)
    np.testing.assert_allclose(many.router_z_loss, one.router_z_loss, rtol=1e-6)
    np.testing.assert_allclose(many.grad_norm, one.grad_norm, rtol=1e-5)
    assert (many.counted_tokens, many.tokens) == (one.counted_tokens, one.tokens)
    for path in before:
        np.testing.assert_allclose(accumulated[path], joined[path], atol=1e-6, err_msg=path)
    for path, sums in many.router.items():
        np.testing.assert_allclose(sums.gates, one.router[path].gates, rtol=1e-5)


def test_micro_batches_have_unequal_token_counts_in_that_test():
    counts = batch_of(8, 4).loss_mask[:, :, 1:].sum(axis=(1, 2))
    assert len(set(counts.tolist())) > 1


def test_blank_rows_change_nothing():
    rows = batch_of(3)
    blank = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:, :1])], axis=1), rows)
    without, one, before = one_step(tiny_model(**LOSSES), rows)
    with_blank, other, _ = one_step(tiny_model(**LOSSES), blank)
    np.testing.assert_allclose(other.loss, one.loss, rtol=1e-6)
    for path in before:
        np.testing.assert_allclose(with_blank[path], without[path], atol=1e-6)


@pytest.mark.parametrize(("part", "per_module"), [("all", 3), ("router", 1), ("experts", 2)])
def test_only_the_selected_part_has_state_and_changes(part, per_module):
    model = tiny_model()
    adapter, everything = arrays(model, mlj.MoeLoraParam), arrays(model)
    optimizer = adamw(optax.constant_schedule(0.1), weight_decay=0.1, max_grad_norm=1.0)
    graphdef, state, frozen = split_model(model, PARTS[part], optimizer)
    selected = len(jax.tree.leaves(state.trainable))
    assert selected == MODULES * per_module
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 0]
    assert len(moments) == 2 * selected
    assert sum(m.size for m in moments) == 2 * sum(x.size for x in jax.tree.leaves(state.trainable))
    del graphdef, frozen

    after, _, before = one_step(model, batch_of(4), optimizer, part)
    assert all(np.any(after[path] != before[path]) for path in before)
    now = arrays(model)
    for path, value in everything.items():
        if path not in before and "count" not in path:
            np.testing.assert_array_equal(now[path], value, err_msg=path)
    assert len(adapter) == MODULES * 3


def test_filters_work_with_nnx():
    model = tiny_model(router_bias=True)
    routers, experts = arrays(model, router_only), arrays(model, experts_only)
    assert all(".router." in path for path in routers) and len(routers) == 2 * MODULES
    assert all(path.endswith(("lora_a", "lora_b")) for path in experts) and len(experts) == 2 * MODULES
    assert routers.keys() | experts.keys() == arrays(model, mlj.MoeLoraParam).keys()
    graphdef, part, rest = nnx.split(model, router_only, ...)
    assert len(jax.tree.leaves(part)) == len(routers)
    nnx.merge(graphdef, part, rest)


@pytest.mark.parametrize(
    ("fields", "routed"),
    [
        ({"scope": "ffn", "target_modules": ["gate_proj", "up_proj", "down_proj"]}, ["model.layers.0.mlp"]),
        ({"scope": "model", "router_depth": 2, "router_hidden_size": 8, "router_bias": True}, ["model"]),
        ({"mix": "weights", "n_splits": 2, "scoring_func": "sigmoid", "top_k": None}, None),
    ],
    ids=["ffn", "model", "splits"],
)
def test_routers_train_wherever_they_stand(fields, routed):
    after, metrics, before = one_step(tiny_model(**fields, **LOSSES), batch_of(4), part="router")
    assert before and all(np.any(after[path] != before[path]) for path in before)
    assert not any(path.endswith(("lora_a", "lora_b")) for path in before)
    assert list(metrics.router) == routed or len(metrics.router) == MODULES
    splits = fields.get("n_splits", 1)
    for sums in metrics.router.values():
        assert sums.tokens == splits * metrics.tokens and sums.gates.shape == (3,)
    assert np.isfinite(metrics.loss) and metrics.load_balancing_loss > 0.9


def test_the_users_model_survives_donation():
    model = tiny_model(**LOSSES)
    ids = jnp.ones((1, 4), int)
    before = np.asarray(model(ids))
    buffers = [variable[...] for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    model.train()
    graphdef, state, frozen = split_model(model, mlj.MoeLoraParam, SGD)
    model.eval()
    donated = jax.tree.leaves(state.trainable)
    make_train_step(graphdef, SGD, model.moe_lora_config)(state, frozen, batch_of(4))
    assert all(x.is_deleted() for x in donated)
    assert not any(x.is_deleted() for x in buffers)
    np.testing.assert_array_equal(model(ids), before)


def test_dropout_differs_by_step_and_by_micro_batch_and_repeats_from_the_same_state():
    fields = {"lora_dropout": 0.5, "expert_dropout": 0.3, "router_jitter_noise": 0.1}
    same = batch_of(4)
    twice = jax.tree.map(lambda x: np.concatenate([x, x]), same)  # two equal micro-batches

    def losses(batch, steps):
        model = tiny_model(**fields)
        model.train()
        optimizer = optax.sgd(0.0)
        graphdef, state, frozen = split_model(model, mlj.MoeLoraParam, optimizer)
        step = make_train_step(graphdef, optimizer, model.moe_lora_config)
        found = []
        for _ in range(steps):
            state, metrics = step(state, frozen, batch)
            found.append(float(metrics.loss))
        return found

    first, second = losses(same, 2)
    assert first != second
    assert losses(same, 2) == [first, second]
    np.testing.assert_allclose(losses(twice, 1)[0], (first + second) / 2, rtol=1e-6)


def test_dropout_is_off_in_evaluation_and_its_stream_rests():
    plain, dropping = tiny_model(), tiny_model(lora_dropout=0.5)
    batch = jax.tree.map(lambda x: x[0], batch_of(3))
    found = []
    for model in (plain, dropping):
        graphdef, state, frozen = split_model(model, mlj.MoeLoraParam, SGD)
        (loss,) = run_batches(batch_loss, graphdef, (state.trainable, state.rng, *frozen), [batch])
        found.append(loss.mean)
        assert loss.counted_tokens == batch.loss_mask[:, 1:].sum()
    assert found[0] == found[1]
    config = dataclasses.replace(plain.moe_lora_config, router_aux_loss_coef=0.0)
    expected = reference_loss(plain, jax.tree.map(lambda x: x[None], batch), config)
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_a_bfloat16_base_trains_float32_adapters():
    model = tiny_model()
    base = nnx.state(model, nnx.All(nnx.Param, nnx.Not(mlj.MoeLoraParam)))
    nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), base))
    after, metrics, before = one_step(model, batch_of(4))
    assert all(x.dtype == np.float32 for x in after.values())
    assert np.isfinite(metrics.loss) and metrics.loss.dtype == jnp.float32
    assert any(np.any(after[p] != before[p]) for p in before)


def test_zero_b_gives_the_router_no_gradient_on_the_first_step():
    after, _, before = one_step(tiny_model(init_lora_weights=True), batch_of(4))
    for path in before:
        assert np.any(after[path] != before[path]) == path.endswith("lora_b"), path


def test_one_compile_per_bucket():
    model = tiny_model(**LOSSES)
    model.train()
    graphdef, state, frozen = split_model(model, mlj.MoeLoraParam, SGD)
    step = make_train_step(graphdef, SGD, model.moe_lora_config)
    for seed in range(3):
        state, _ = step(state, frozen, batch_of(4, seed=seed))
    assert step._cache_size() == 1


def test_a_model_without_adapter_trains_too():
    model = tiny_base()
    graphdef, state, frozen = split_model(model, nnx.Param, SGD)
    _, metrics = make_train_step(graphdef, SGD, None)(state, frozen, batch_of(4))
    assert metrics.router == {} and metrics.load_balancing_loss == 0
    assert metrics.loss == metrics.lm_loss
