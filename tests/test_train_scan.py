"""Training with the layers as one scan: stacked states, the same steps, checkpoints that either form takes up."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_training import LLAMA, TARGETS, arrays, compiled_once, token_data  # noqa: F401

import moe_lora_jax as mlj
from benchmarks.program import gradient, instructions
from moe_lora_jax.adapters.filters import PARTS
from moe_lora_jax.models import CausalLM, DecoderConfig
from moe_lora_jax.models.stacked import stack_layers, unstack_layers
from moe_lora_jax.train import TrainSettings, make_train_step, merge_back, split_model, train
from moe_lora_jax.train.batches import collate
from moe_lora_jax.train.evaluation import batch_loss, run_batches
from moe_lora_jax.train.step import Batch

pytestmark = pytest.mark.usefixtures("compiled_once")
DROPOUT = {"lora_dropout": 0.2, "router_jitter_noise": 0.1}


def model_of(layers: int = 3, *, scan: bool, **fields) -> CausalLM:
    model = CausalLM(DecoderConfig.from_hf({**LLAMA, "num_hidden_layers": layers}), rngs=nnx.Rngs(0))
    model.model.scan_layers = scan
    sizes = {"r": 2, "num_experts": 3, "top_k": 2, "target_modules": TARGETS, "init_lora_weights": False}
    return mlj.apply_moe_lora(model, mlj.MoeLoraConfig(**{**sizes, **fields}), rngs=nnx.Rngs(1))


def batch() -> Batch:
    rows, _ = collate(token_data(4).examples, 4, (24,), 0)
    return jax.tree.map(lambda x: x.reshape(2, 2, -1), rows)


def trained(steps: int = 2, part: str = "all", **fields) -> tuple:
    model = model_of(**fields)
    model.train()
    optimizer = optax.sgd(0.1)
    graphdef, state, frozen = split_model(model, PARTS[part], optimizer)
    step = make_train_step(graphdef, optimizer, model.moe_lora_config)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch())
        losses.append(float(metrics.loss))
    model.eval()
    rows, _ = collate(token_data(4).examples, 4, (24,), 0)
    (loss,) = run_batches(batch_loss, nnx.graphdef(model), (state.trainable, state.rng, *frozen), [rows])
    merge_back(model, state, frozen)
    return losses, float(loss.mean), arrays(model, PARTS["all"]), nnx.state(model, nnx.RngState)


@pytest.mark.parametrize("part", ["all", "router"])
def test_steps_are_those_of_the_loop(part):
    plain, scanned = (trained(scan=scan, part=part, router_aux_loss_coef=0.1, **DROPOUT) for scan in (False, True))
    np.testing.assert_allclose(scanned[0], plain[0], rtol=1e-5)
    assert scanned[1] == pytest.approx(plain[1], rel=1e-5)
    assert scanned[2].keys() == plain[2].keys()
    for path, array in plain[2].items():
        np.testing.assert_allclose(scanned[2][path], array, rtol=0, atol=1e-5)
    for one, other in zip(jax.tree.leaves(scanned[3]), jax.tree.leaves(plain[3]), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype


def test_states_are_stacked_and_come_back_whole():
    model = model_of(scan=True, **DROPOUT)
    _, state = nnx.split(model)
    stacked = stack_layers(state)
    paths = {path for path, _ in nnx.to_flat_state(stacked)}
    assert ("model", "stacked_layers", "self_attn", "q_proj", "lora_a") in paths and len(paths) < len(
        nnx.to_flat_state(state)
    )
    back = unstack_layers(stacked)
    for (path, old), (same, new) in zip(nnx.to_flat_state(state), nnx.to_flat_state(back), strict=True):
        assert path == same and type(old) is type(new)
        if not isinstance(old, nnx.RngState):
            np.testing.assert_array_equal(new[...], old[...])
    assert jax.tree.structure(back) == jax.tree.structure(state)


def test_layers_that_differ_stay_apart():
    model = model_of(scan=False, target_modules=[*TARGETS[1:], "model.layers.1.self_attn.q_proj"])
    _, state = nnx.split(model)
    assert jax.tree.structure(unstack_layers(stack_layers(state))) == jax.tree.structure(state)
    paths = {path for path, _ in nnx.to_flat_state(stack_layers(state))}
    assert ("model", "layers", 1, "self_attn", "q_proj", "lora_a") in paths


def test_the_program_does_not_grow_with_the_layers():
    sizes = [instructions(gradient(layers=n, experts=3, scan_layers=True, remat="none", quick=True)) for n in (2, 5)]
    assert sizes[0] == sizes[1]


def test_a_checkpoint_of_one_form_goes_on_in_the_other(tmp_path):
    """Two steps as a scan, two as a loop: the run of four steps as a loop."""
    data, fields = token_data(16), {"batch_size": 4, "checkpoint_every": 2, "learning_rate": 1e-2}
    whole = model_of(scan=False)
    train(whole, data, tmp_path / "whole", TrainSettings(steps=4, **fields))

    class Stopped(Exception):
        pass

    def stop(step: int, model: nnx.Module) -> None:
        if step == 3:
            raise Stopped

    settings = TrainSettings(steps=4, eval_every=3, **fields)
    with pytest.raises(Stopped):
        train(model_of(scan=True), data, tmp_path / "two", settings, eval_data=token_data(4, seed=1), on_eval=stop)
    continued = model_of(scan=False)
    settings = TrainSettings(steps=4, eval_every=3, resume=True, **fields)
    train(continued, data, tmp_path / "two", settings, eval_data=token_data(4, seed=1))
    for path, array in arrays(whole, PARTS["all"]).items():
        np.testing.assert_allclose(arrays(continued, PARTS["all"])[path], array, rtol=0, atol=2e-5)
