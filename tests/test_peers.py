"""Adapters that other programs wrote: read, run, convert, written back, trained further."""

import json
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import moe_lora_interop
import moe_lora_jax as mlj
from moe_lora_interop.checkpoint.directory import Directory
from moe_lora_interop.config.stuck_routers import stuck_routers
from moe_lora_interop.dialects.registry import dialect_named, file_dialects
from moe_lora_interop.disk import files, torch_files
from moe_lora_interop.rules.tensors import claim
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
    "coin/adapter": "coin",
    "coin/trainer": "coin",
    "comol/core_router": "comol",
    "comol/input_router": "comol",
    "hydralora/adapter": "hydralora",
    "ld_mole/softmax": "loramoe",
    "ld_mole/sparsegen": "ld-mole",
    "ld_mole/sparsegen_attention": "ld-mole",
    "loramoe/adapter": "loramoe",
    "meteora/top1": "meteora",
    "meteora/top2_T15": "meteora",
    "moe_peft/loramoe": "moe-peft-loramoe",
    "moe_peft/mixlora": "mixlora",
    "moe_peft/mola": "moe-peft-mola",
    "moelora/adapter": "moelora",
    "mola/adapter": "mola",
    "mtl_lora/moelora_per_layer": "mtl-moelora",
    "mtl_lora/mtl_lora": "mtl-lora",
    "mtl_lora/mtl_lora_diagonal": "mtl-lora",
    "poly/mhr_splits2": "poly",
    "poly/poly": "poly",
    "seed_style/all_experts": "peft-router",
    "xlora/depth1_layerwise": "xlora",
    "xlora/depth2": "xlora",
    "xlora/depth2_scaling_pass": "xlora",
    "xlora/depth2_topk": "xlora",
    "xlora_original/depth1": "xlora-original",
    "xlora_original/depth1_layerwise": "xlora-original",
    "xlora_original/depth2_nosoftmax": "xlora-original",
    "xlora_original/depth2_nosoftmax_topk": "xlora-original",
    "xlora_original/depth2_topk": "xlora-original",
    "xlora_original/depth3": "xlora-original",
    "xlora_original/depth3_linear_nobias": "xlora-original",
    "xlora_original/scaling_pass": "xlora-original",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*left out. ")  # MeteoRA's files have the whole base
READ_ONLY = {"comol", "mtl-lora", "mtl-moelora"}
OPTIONS = {  # of other readers, so that they do not refuse because of a missing one
    "mola": {"top_k": 1},
    "peft-router": {"router_input": "hidden", "top_k": None},
    "for-ai-molora": {"r": 4, "num_experts": 5},
    "meteora": {"top_k": 1, "temperature": 1, "adapters": []},
    "mtl-lora": {"lora_alpha": 1, "temperature": 1},
    "mtl-moelora": {"lora_alpha": 1},
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
    assert len(ALL) == len(READABLE) + len(REFUSED) == 50


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
    if layout in READ_ONLY:
        with pytest.raises(moe_lora_interop.CheckpointError, match=f"{layout} is read and not written"):
            moe_lora_interop.write(native, tmp_path / "theirs", layout)
        assert not (tmp_path / "theirs").exists()
        return
    moe_lora_interop.write(native, tmp_path / "theirs", layout)
    assert moe_lora_interop.detect(tmp_path / "theirs") == layout
    assert_identical(moe_lora_interop.read(tmp_path / "theirs", **peer.options), adapter)


def stored_tensors(directory, layout, options) -> dict[str, np.ndarray]:
    """By their names in the files, without copies, dead tensors and those of the base."""
    with Directory(directory) as opened:
        stored = opened.stored(dialect_named(layout), options)
        rules = dialect_named(layout).specialised(stored.raw).rules
        kinds = {name: claim(rules, name, len(info.shape)) for name, info in stored.infos.items()}
        return {n: np.asarray(t) for n, t in stored.tensors().items() if kinds[n] is not None and kinds[n].copy == ""}


@named
def test_written_back_the_tensors_have_the_peers_names_and_values(peer, tmp_path):
    layout = moe_lora_interop.detect(peer.directory)
    if layout in READ_ONLY:
        return
    duplicates = layout == "ld-mole"  # one rule stores a temperature network under every module, whatever its width
    adapter = moe_lora_interop.read(peer.directory, **peer.options)
    moe_lora_interop.write(adapter, tmp_path, layout, duplicates=duplicates)
    found, expected = (stored_tensors(d, layout, peer.options) for d in (tmp_path, peer.directory))
    if peer.name == "xlora_original/depth3_linear_nobias":  # three layers without an activation, which are one here
        assert found.keys() - expected.keys() == set() and expected.keys() - found.keys() == {
            "main/inner.0.weight",
            "main/inner.1.weight",
        }
        product = (expected["main/last.weight"] @ expected["main/inner.1.weight"]) @ expected["main/inner.0.weight"]
        np.testing.assert_allclose(found.pop("main/last.weight"), product, rtol=1e-5, atol=1e-6)
        expected = {name: expected[name] for name in found}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tobytes() == tensor.tobytes(), name


def test_the_weights_of_the_base_that_lie_inside_are_checked_or_said(tmp_path):
    peer = Peer("meteora/top1")
    with pytest.warns(UserWarning, match="left out: lm_head.weight .* and 15 more. These belong to the base model"):
        assert len(moe_lora_interop.read(peer.directory, **peer.options).base_tensors) == 21
    base = mlj.load_base_model(peer.base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlj.load_adapter(base, peer.directory, **peer.options)  # equal to this base: nothing to say
    other = mlj.load_base_model(peer.base)
    norm = other.model.layers[1].input_layernorm
    norm.weight.set_value(norm.weight[...] * 1.5)
    with pytest.raises(moe_lora_interop.CheckpointError, match="layers.1.input_layernorm.weight: other values than"):
        mlj.load_adapter(other, peer.directory, **peer.options)


def test_a_full_state_with_something_else_is_refused_with_the_reason(tmp_path):
    peer = Peer("meteora/top1")
    tensors = files.read_tensors(peer.directory / "model.safetensors")
    extra = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight"
    files.write_tensors(tmp_path / "model.safetensors", {**tensors, extra: np.ones((32, 1), "f4")}, {})
    with pytest.raises(moe_lora_interop.CheckpointError, match=f"meteora: no rule for main/{extra}"):
        moe_lora_interop.detect(tmp_path)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.moe_gate.weight"]
    files.write_tensors(tmp_path / "model.safetensors", tensors, {})
    with pytest.raises(moe_lora_interop.CheckpointError, match="layers.0.self_attn.q_proj router: missing tensor"):
        moe_lora_interop.read(tmp_path, **peer.options)
    with pytest.raises(moe_lora_interop.CheckpointError, match="expected one of adapter_model.safetensors") as error:
        moe_lora_interop.detect(peer.base)  # which has a file of this name, too
    assert not any("meteora" in problem for problem in error.value.problems)


def test_where_the_task_folders_are(tmp_path):
    peer = Peer("meteora/top1")
    relative = peer.options | {"adapters": peer.provenance["read_options"]["adapters"]}  # to the checkpoint
    assert_identical(*(moe_lora_interop.read(peer.directory, **o) for o in (relative, peer.options)))
    for wrong, reason in (
        ({"adapters": "../adapters/alpaca"}, "option adapters: found '../adapters/alpaca', expected a list of folders"),
        ({"adapters": peer.options["adapters"][:4]}, "expected 12|expected"),
        ({"adapters": ["../nowhere"] * 5}, "expected different folders"),
        ({"adapters": [f"../nowhere{n}" for n in range(5)]}, "expert 0: .*nowhere0 is no directory"),
    ):
        with pytest.raises(moe_lora_interop.CheckpointError, match=reason):
            moe_lora_interop.read(peer.directory, **peer.options | wrong)
    with pytest.raises(moe_lora_interop.ConfigError) as error:
        moe_lora_interop.read(peer.directory)
    assert [p.split(":")[0] for p in error.value.problems] == ["option top_k", "option temperature", "option adapters"]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"a model")
    with pytest.raises(moe_lora_interop.CheckpointError, match="is a model's directory"):
        moe_lora_interop.write(moe_lora_interop.read(peer.directory, **peer.options), tmp_path, "meteora")
    assert (tmp_path / "model.safetensors").read_bytes() == b"a model"


def test_x_loras_folders_may_be_elsewhere_and_its_classifier_in_torchs_format(tmp_path):
    peer = Peer("xlora_original/depth2_topk")
    for name in ("xlora_config.json", "xlora_classifier.safetensors"):
        shutil.copy(peer.directory / name, tmp_path / name)
    with pytest.raises(moe_lora_interop.CheckpointError, match="expert 0: .*adapter_1 is no directory"):
        moe_lora_interop.read(tmp_path)
    folders = [str(peer.directory / f"adapter_{n}") for n in (1, 2, 3, 4)]
    expected = moe_lora_interop.read(peer.directory)
    assert_identical(moe_lora_interop.read(tmp_path, adapters=folders), expected)
    classifier = files.read_tensors(tmp_path / "xlora_classifier.safetensors")
    (tmp_path / "xlora_classifier.safetensors").unlink()
    torch_files.write(tmp_path / "xlora_classifier.pt", classifier)
    assert_identical(moe_lora_interop.read(tmp_path, adapters=folders), expected)


def test_of_equal_gates_in_a_first_pass_any_may_be_kept(tmp_path):
    peer = Peer("xlora_original/scaling_pass")
    copy = shutil.copytree(peer.directory, tmp_path / "copy")
    config = json.loads((copy / "xlora_config.json").read_text())
    (copy / "xlora_config.json").write_text(json.dumps({**config, "top_k_lora": 2}))
    with pytest.raises(moe_lora_interop.ConfigError, match="scaling_pass_value: found 0.5 together with top_k"):
        moe_lora_interop.read(copy)


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
    if moe_lora_interop.detect(peer.directory) == "mtl-lora":  # its table's gates are exactly 0 and 1: no gradient
        stuck = {slot for slot in before if slot[1] == "task_embedding"}
    after = mlj.to_adapter(model).tensors
    assert stuck == {slot for slot, tensor in before.items() if np.array_equal(after[slot], tensor)}


@pytest.mark.parametrize("peer", REFUSED, ids=lambda p: p.name)
def test_refusals_say_why(peer):
    reason = {
        "seed_style": "found expert = 1, expected 4",
        "xlora/broken": r"peft 0.20.1.dev0 and 0.21 save X-LoRA classifiers empty or truncated",
        "xlora_original/softmax_topk": "enable_softmax_topk: found True, which is one softmax over every kept score",
        "xlora_original/broken_digit_names": "adapters whose names are numbers",
        "xlora_original/broken_names_prefix": r"lora_A2.weight and 3 more[\s\S]*the beginning of another's",
    }
    expected = next(text for start, text in reason.items() if peer.name.startswith(start))
    with pytest.raises((moe_lora_interop.CheckpointError, moe_lora_interop.ConfigError), match=expected):
        moe_lora_interop.read(peer.directory, **peer.options)
