"""Adapters that other programs wrote: read, run, convert, written back, trained further."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import moe_lora_interop
import moe_lora_jax as mlj
from moe_lora_interop.config.stuck_routers import stuck_routers
from moe_lora_interop.dialects.registry import file_dialects
from tests.peers_data import ALL, READABLE, REFUSED, WITH_LOGITS, Peer

LAYOUTS = {
    "adamole/adamole": "adamole",
    "adamole/mole_threshold": "mole",
    "adamole/mole_topk": "mole",
    "arrow/arrow": "arrow",
    "dynmole/no_entropy": "dynmole",
    "dynmole/shannon": "dynmole",
    "dynmole/tsallis_q2": "dynmole",
    "ewora/ewora": "ewora",
    "ewora/rank_pattern": "ewora",
    "hydralora/adapter": "hydralora",
    "ld_mole/softmax": "loramoe",
    "ld_mole/sparsegen": "ld-mole",
    "ld_mole/sparsegen_attention": "ld-mole",
    "loramoe/adapter": "loramoe",
    "moe_peft/loramoe": "moe-peft-loramoe",
    "moe_peft/mixlora": "mixlora",
    "moe_peft/mola": "moe-peft-mola",
    "moelora/adapter": "moelora",
    "mola/adapter": "mola",
    "poly/mhr_splits2": "poly",
    "poly/poly": "poly",
    "seed_style/all_experts": "peft-router",
    "xlora/depth1_layerwise": "xlora",
    "xlora/depth2": "xlora",
    "xlora/depth2_topk": "xlora",
}
OPTIONS = {  # what a layout does not record, so that no reader refuses for want of them
    "mola": {"top_k": 1},
    "peft-router": {"router_input": "hidden", "top_k": None},
    "for-ai-molora": {"r": 4, "num_experts": 5},
}
named = pytest.mark.parametrize("peer", READABLE, ids=lambda p: p.name)


def load(peer: Peer) -> nnx.Module:
    return mlj.load_adapter(mlj.load_base_model(peer.base), peer.directory, **peer.options)


def arguments(peer: Peer, ids: str = "task_ids") -> dict[str, jnp.ndarray]:
    return {"task_ids": jnp.asarray(peer.reference[ids])} if ids in peer.reference else {}


def assert_identical(found: moe_lora_interop.Adapter, expected: moe_lora_interop.Adapter) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    for slot, tensor in expected.tensors.items():
        assert found.tensors[slot].dtype == tensor.dtype
        assert found.tensors[slot].tobytes() == tensor.tobytes(), slot
    assert found.config == expected.config


def test_every_peer_is_covered():
    assert {p.name for p in READABLE} == LAYOUTS.keys()
    assert len(ALL) == len(READABLE) + len(REFUSED) == 30


@named
def test_the_layout_is_detected(peer):
    assert moe_lora_interop.detect(peer.directory) == LAYOUTS[peer.name]


@named
def test_no_other_reader_takes_it(peer):
    for dialect in file_dialects():
        if dialect.name != LAYOUTS[peer.name]:
            with pytest.raises((moe_lora_interop.CheckpointError, moe_lora_interop.ConfigError)):
                moe_lora_interop.read(peer.directory, dialect.name, **OPTIONS.get(dialect.name, {}))


@pytest.mark.parametrize("peer", WITH_LOGITS, ids=lambda p: p.name)
def test_jax_gives_the_peers_own_logits(peer):
    reference = peer.reference
    logits = load(peer)(jnp.asarray(reference["input_ids"]), **arguments(peer))
    assert np.abs(reference["logits"] - reference["base_logits"]).max() > 0.3
    # LD-MoLE's temperature goes down to 0.01, which multiplies its own rounding: its provenance says 2e-4
    np.testing.assert_allclose(logits, reference["logits"], atol=2e-4 if "sparsegen" in peer.name else 1e-4)


def test_several_task_ids_are_averaged_as_the_peer_does():
    peer = Peer("moelora/adapter")
    logits = load(peer)(jnp.asarray(peer.reference["input_ids"]), **arguments(peer, "multi_task_ids"))
    np.testing.assert_allclose(logits, peer.reference["multi_logits"], atol=1e-4)


@named
def test_through_native_and_back_to_its_own_layout_bit_for_bit(peer, tmp_path):
    adapter = moe_lora_interop.read(peer.directory, **peer.options)
    moe_lora_interop.write(adapter, tmp_path / "native")
    native = moe_lora_interop.read(tmp_path / "native")
    assert_identical(native, adapter)
    layout = moe_lora_interop.detect(peer.directory)
    moe_lora_interop.write(native, tmp_path / "theirs", layout)
    assert moe_lora_interop.detect(tmp_path / "theirs") == layout
    assert_identical(moe_lora_interop.read(tmp_path / "theirs", **peer.options), adapter)


@named
def test_through_the_nnx_tree_bit_for_bit(peer, tmp_path):
    model = load(peer)
    mlj.save_pretrained(model, tmp_path)
    assert_identical(moe_lora_interop.read(tmp_path), moe_lora_interop.read(peer.directory, **peer.options))


@pytest.mark.parametrize("peer", WITH_LOGITS, ids=lambda p: p.name)
def test_five_training_steps_lower_the_loss_and_move_every_tensor(peer):
    model = load(peer)
    before = mlj.to_adapter(model).tensors
    model.train()
    ids = jnp.asarray(peer.reference["input_ids"])
    extra = arguments(peer)

    def loss_of(model):
        logits = model(ids, **extra)[:, :-1].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, mlj.MoeLoraParam))(model)
        optimizer.update(model, gradients)
        return loss

    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=mlj.MoeLoraParam)
    losses = [float(step(model, optimizer)) for _ in range(6)]
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    stuck = {
        (module, "router") for module in stuck_routers(model.moe_lora_config, model.moe_lora_config.target_modules)
    }
    after = mlj.to_adapter(model).tensors
    assert stuck == {slot for slot, tensor in before.items() if np.array_equal(after[slot], tensor)}


@pytest.mark.parametrize("peer", REFUSED, ids=lambda p: p.name)
def test_refusals_say_why(peer):
    reason = {
        "seed_style": "found expert = 1, expected 4",
        "xlora/broken": r"peft 0.20.1.dev0 and 0.21 save X-LoRA classifiers empty or truncated",
        "xlora/depth2_scaling_pass": "scaling_pass_value: found 0.3, expected 0.0",
    }
    expected = next(text for start, text in reason.items() if peer.name.startswith(start))
    with pytest.raises(moe_lora_interop.CheckpointError, match=expected):
        moe_lora_interop.read(peer.directory, **peer.options)
