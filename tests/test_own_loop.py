"""Training loops of one's own, as in docs/own-loop.md: with dropout and the routers' losses, and both kinds alike."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_training import arrays, compiled_once, small_dirs, tiny_model, token_data  # noqa: F401

import moe_lora_jax as mlj
from moe_lora_jax.train import (
    TrainBatches,
    load_balancing_loss,
    make_train_step,
    merge_back,
    next_token_loss,
    split_model,
)

PAGE = Path(__file__).parent.parent / "docs/own-loop.md"
pytestmark = pytest.mark.usefixtures("compiled_once")
NOISY = {"lora_dropout": 0.5, "router_aux_loss_coef": 0.3}
SCOPES = {
    "linear": {},
    "ffn": {"scope": "ffn", "target_modules": ["gate_proj", "down_proj"]},
    "model": {"scope": "model"},
}


def batches():
    """Four steps on the same few examples."""
    fields = {"batch_size": 4, "gradient_accumulation": 1, "epochs": 8, "seed": 0, "pad_id": 0}
    return [host.batch for host in TrainBatches(token_data(4).examples, **fields)]


def jitted(config, **how):
    """A step on NNX objects; the loss has all logits at once."""

    def loss_of(model, batch):
        logits, router = model(batch.input_ids, batch.attention_mask, return_router=True)
        balance = load_balancing_loss(router, config, batch.attention_mask)
        loss = next_token_loss(logits, batch.input_ids, batch.loss_mask).mean
        return loss + config.router_aux_loss_coef * balance

    @nnx.jit(**how)
    def step(model, optimizer, batch):
        gradient_of = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, mlj.MoeLoraParam))
        loss, gradient = gradient_of(model, batch)
        optimizer.update(model, gradient)
        return loss

    return step


def with_nnx(model):
    """[loss] of a loop with nnx.value_and_grad; the model is trained in place."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=mlj.MoeLoraParam)
    step = jitted(model.moe_lora_config, graph_updates=False)
    return [float(step(model, optimizer, jax.tree.map(lambda rows: rows[0], batch))) for batch in batches()]


def with_the_functional_step(model):
    """[loss] of a loop with the step that `train` uses."""
    optimizer = optax.adam(1e-2)
    graphdef, state, frozen = split_model(model, mlj.MoeLoraParam, optimizer)
    step = make_train_step(graphdef, optimizer, model.moe_lora_config)
    losses = []
    for batch in batches():
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics.loss))
    merge_back(model, state, frozen)
    return losses


def test_both_loops_train_alike_with_dropout_and_balancing():
    one, other = tiny_model(**NOISY), tiny_model(**NOISY)
    one.train(), other.train()
    losses, others = with_nnx(one), with_the_functional_step(other)
    np.testing.assert_allclose(losses, others, rtol=1e-5)
    assert losses[-1] < losses[0] - 0.1
    for name, value in arrays(other, mlj.MoeLoraParam).items():
        np.testing.assert_allclose(arrays(one, mlj.MoeLoraParam)[name], value, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("scope", ["ffn", "model"])
def test_the_nnx_loop_works_in_every_scope(scope):
    model = tiny_model(**NOISY, **SCOPES[scope])
    before = arrays(model, nnx.Not(mlj.MoeLoraParam))
    model.train()
    losses = with_nnx(model)
    assert losses[-1] < losses[0]
    after = arrays(model, nnx.Not(mlj.MoeLoraParam))
    assert all((after[name] == value).all() for name, value in before.items() if "count" not in name)
    assert any((after[name] != value).any() for name, value in before.items() if "count" in name)


def test_dropout_is_on_in_train_mode_alone():
    model, ids = tiny_model(lora_dropout=0.5), jnp.asarray([[1, 5, 7, 9]])
    np.testing.assert_array_equal(model(ids), model(ids))
    model.train()
    assert (model(ids) != model(ids)).any()
    model.eval()
    np.testing.assert_array_equal(model(ids), model(ids))


@pytest.mark.parametrize("field", ["lora_dropout", "expert_dropout", "router_jitter_noise"])
def test_a_model_in_eval_mode_is_not_trained_without_a_word(field):
    model = tiny_model(**{field: 0.1})
    with pytest.warns(UserWarning, match=f"{field} off in training: call model.train"):
        with_the_functional_step(model)
    model.train()
    with_the_functional_step(model)  # warnings are errors here


def test_nothing_is_said_where_eval_mode_changes_nothing():
    with_the_functional_step(tiny_model())


@pytest.mark.parametrize("scope", SCOPES)
def test_a_step_gives_back_what_it_changed_alone(scope):
    """In bytes of the compiled program; without graph_updates=False it copies the base model."""
    model = tiny_model(**NOISY, **SCOPES[scope])
    model.train()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=mlj.MoeLoraParam)
    batch = jax.tree.map(lambda rows: rows[0], batches()[0])
    changed = sum(a.nbytes for a in jax.tree.leaves((nnx.state(model, mlj.MoeLoraParam), nnx.state(optimizer))))
    base = sum(array.nbytes for array in arrays(model, nnx.Not(mlj.MoeLoraParam)).values())
    given_back = {}
    for how in ({"graph_updates": False}, {}):
        program = jitted(model.moe_lora_config, **how).lower(model, optimizer, batch).compile()
        given_back[bool(how)] = program.compiled.memory_analysis().output_size_in_bytes
    assert changed <= given_back[True] < changed + 1000  # counters, and the table of results
    assert given_back[False] > given_back[True] + 0.9 * base


def test_the_page_runs_on_eight_devices(small_dirs, tmp_path):  # noqa: F811
    """Its last line compares the losses, after an interruption, with those of `train`'s step."""
    shutil.copytree(small_dirs["base"], tmp_path / "base")
    shutil.copy(small_dirs["data"], tmp_path / "data.jsonl")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert "np.testing.assert_allclose([*losses, *more], theirs" in blocks[-1]
    (tmp_path / "page.py").write_text("\n".join([*blocks, "assert jax.device_count() == mesh.size == 8"]))
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p),
    }
    command = [sys.executable, "-W", "error", "page.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
