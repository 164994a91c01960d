"""From a model to a directory and back, bit by bit."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import moe_lora_interop
from moe_lora_interop import Adapter, CheckpointError, ConfigError, MoeLoraConfig
from moe_lora_jax import MoeLoraParam, apply_moe_lora, load_adapter, save_pretrained, to_adapter
from tests.adapters import assert_same_tensors, make_tensors
from tests.toy import HIDDEN, IN, MODULES, Toy, assert_same_leaves, fast_rngs, inputs, leaves, linear, run

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
KINDS = {
    "dense": {},
    "top_k": dict(top_k=2),
    "bias": dict(router_bias=True),
    "adaptive": dict(threshold=0.5, adaptive_threshold=True),
    "shared_A": dict(shared_lora_A=True),
    "unequal": dict(r=[1, 4, 2], lora_alpha=[1.0, 2.0, 30.0]),
    "one_expert": dict(num_experts=1),
    "patterns": dict(num_experts_pattern={"q_proj": 1, "up_proj": 2}, rank_pattern={"down_proj": 5}),
    "dropout": dict(lora_dropout=0.5, expert_dropout=0.1, router_jitter_noise=0.1),
}


def load(model, source, **options):
    return load_adapter(model, source, **{"rngs": fast_rngs(1), **options})


def adapted(model=None, param_dtype=jnp.float32, **fields):
    """A model whose every adapter variable is random."""
    fields = {"r": 2, "num_experts": 3, "init_lora_weights": False, "target_modules": "all-linear", **fields}
    model = Toy() if model is None else model
    apply_moe_lora(model, MoeLoraConfig(**fields), rngs=fast_rngs(0), param_dtype=param_dtype)
    rng = np.random.default_rng(0)
    for path, variable in nnx.iter_graph(model):
        if isinstance(variable, MoeLoraParam) and "router" in path:
            variable[...] = jnp.asarray(rng.normal(size=variable.shape), variable.dtype)
    return model


SAVED = [(kind, jnp.float32) for kind in KINDS]
SAVED += [(kind, dtype) for kind in ("top_k", "unequal", "one_expert") for dtype in (jnp.bfloat16, jnp.float16)]


@pytest.mark.parametrize(("kind", "dtype"), SAVED)
def test_save_then_load_is_bit_exact(tmp_path, kind, dtype):
    model = adapted(param_dtype=dtype, **KINDS[kind])
    save_pretrained(model, tmp_path)
    back = load(Toy(), tmp_path, param_dtype=None)
    assert_same_leaves(leaves(back, MoeLoraParam), leaves(model, MoeLoraParam))
    assert back.moe_lora_config == model.moe_lora_config


@pytest.mark.parametrize(
    ("kind", "dtype"), [("top_k", jnp.float32), ("unequal", jnp.bfloat16), ("patterns", jnp.float32)]
)
def test_a_loaded_model_computes_the_same(tmp_path, kind, dtype):
    model = adapted(param_dtype=dtype, **KINDS[kind])
    save_pretrained(model, tmp_path)
    plain, expected = run(Toy()), run(model)
    assert (expected != plain).any()
    np.testing.assert_array_equal(run(load(Toy(), tmp_path, param_dtype=None)), expected)


def test_the_files_tensors_are_the_models_in_pefts_axes(tmp_path):
    model = adapted(router_bias=True, threshold=0.5, adaptive_threshold=True)
    save_pretrained(model, tmp_path)
    stored, found = load_file(tmp_path / WEIGHTS), leaves(model, MoeLoraParam)
    expected = {}
    for m in MODULES:
        expected[f"{PREFIX}{m}.moe_lora_A"] = found[f"{m}.lora_a"]
        expected[f"{PREFIX}{m}.moe_lora_B"] = found[f"{m}.lora_b"].transpose(0, 2, 1)
        expected[f"{PREFIX}{m}.moe_lora_router.weight"] = found[f"{m}.router.kernel"].T
        expected[f"{PREFIX}{m}.moe_lora_router.bias"] = found[f"{m}.router.bias"]
        expected[f"{PREFIX}{m}.moe_lora_threshold.weight"] = found[f"{m}.router.threshold_kernel"][None]
        expected[f"{PREFIX}{m}.moe_lora_threshold.bias"] = found[f"{m}.router.threshold_bias"][None]
    assert_same_tensors(stored, expected)


def test_saving_changes_nothing_in_the_model(tmp_path):
    model = adapted(lora_dropout=0.1)
    before = leaves(model)
    save_pretrained(model, tmp_path)
    assert_same_leaves(leaves(model), before)
    save_pretrained(model, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


def test_the_saved_config_lists_what_was_matched(tmp_path):
    save_pretrained(adapted(target_modules=r".*\.(q|up)_proj", exclude_modules=["layers.0.q_proj"]), tmp_path)
    assert moe_lora_interop.read(tmp_path).config.target_modules == [
        "layers.0.mlp.up_proj",
        "layers.1.mlp.up_proj",
        "layers.1.q_proj",
    ]


@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_an_adapter_object_loads_like_a_directory():
    model = adapted(top_k=1)
    adapter = to_adapter(model)
    back = load(Toy(), adapter)
    assert_same_leaves(leaves(back, MoeLoraParam), leaves(model, MoeLoraParam))


def test_loading_does_not_tie_the_model_to_the_adapter():
    adapter = to_adapter(adapted())
    before = copy.deepcopy(dict(adapter.tensors))
    model = load(Toy(), adapter)
    model.layers[0].q_proj.lora_a[...] = jnp.zeros((3, 2, IN))
    save = to_adapter(model)
    assert_same_tensors(dict(adapter.tensors), before)
    assert not save.tensors["layers.0.q_proj", "lora_A"].any()


def test_loading_returns_the_same_model_in_eval_mode(tmp_path):
    save_pretrained(adapted(lora_dropout=0.9), tmp_path)
    model = Toy()
    assert load(model, tmp_path) is model
    np.testing.assert_array_equal(run(model), run(model))


def test_a_loaded_model_trains_with_the_dropout_it_was_given(tmp_path):
    save_pretrained(adapted(lora_dropout=0.5), tmp_path)

    def output(seed):
        model = load(Toy(), tmp_path, rngs=fast_rngs(seed))
        model.train()
        return np.asarray(run(model))

    assert (output(1) == output(1)).all() and (output(1) != output(2)).any()


def test_experts_and_routers_of_different_dtypes_are_kept(tmp_path):
    config = MoeLoraConfig(r=2, num_experts=3, target_modules=["q_proj"])
    shapes = {f"layers.{i}.q_proj": (IN, IN) for i in range(2)}
    tensors = make_tensors(config, shapes, dtype="bfloat16", router_dtype="bfloat16")
    for role in ("lora_A", "lora_B"):
        tensors["layers.1.q_proj", role] = tensors["layers.1.q_proj", role].astype("float32")
    moe_lora_interop.write(Adapter(config, tensors), tmp_path)
    for param_dtype in (None, "float32"):
        model = load(Toy(), tmp_path, param_dtype=param_dtype)
        assert_same_tensors(to_adapter(model).tensors, tensors)
        assert np.isfinite(run(model)).all()
    assert {v.dtype for v in leaves(model, MoeLoraParam).values()} == {np.dtype(np.float32)}


# --- another base ---------------------------------------------------------------------------------------------------


def loading_fails(model, source, **options):
    before, kinds = leaves(model), {p: type(m) for p, m in nnx.iter_modules(model)}
    with pytest.raises((CheckpointError, ConfigError)) as error:
        load(model, source, **options)
    assert_same_leaves(leaves(model), before)
    assert {p: type(m) for p, m in nnx.iter_modules(model)} == kinds
    return error.value


def test_every_mismatch_with_another_base_is_listed_and_the_model_left_alone(tmp_path):
    save_pretrained(adapted(Toy(layers=3)), tmp_path)
    problems = loading_fails(Toy(layers=2, hidden=HIDDEN + 1), tmp_path).problems
    missing = {f"layers.2.{kind}" for kind in ("q_proj", "mlp.up_proj", "mlp.down_proj")}
    resized = {f"layers.{i}.mlp.{kind}" for i in range(2) for kind in ("up_proj", "down_proj")}
    assert {p.split(":")[0] for p in problems} == missing | resized
    for problem in problems:
        if problem.split(":")[0] in resized:
            assert "8" in problem and "9" in problem  # found and expected


def test_a_model_that_has_an_adapter_already_is_refused_as_such(tmp_path):
    model = adapted()
    save_pretrained(model, tmp_path)
    assert "already has an adapter" in str(loading_fails(model, tmp_path))


def test_damaged_and_missing_directories_leave_the_model_alone(tmp_path):
    save_pretrained(adapted(), tmp_path / "out")
    loading_fails(Toy(), tmp_path)
    loading_fails(Toy(), tmp_path / "nowhere")
    loading_fails(Toy(), tmp_path / "out", layout="no such layout")
    loading_fails(Toy(), tmp_path / "out", no_such_option=1)
    raw = bytearray((tmp_path / "out" / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (tmp_path / "out" / WEIGHTS).write_bytes(raw)
    assert "digest" in str(loading_fails(Toy(), tmp_path / "out"))


def test_modules_to_save_cannot_be_loaded():
    adapter = to_adapter(adapted(target_modules=["q_proj"]))
    fields = {**adapter.config.to_dict(), "modules_to_save": ["lm_head"]}
    error = loading_fails(Toy(), Adapter(MoeLoraConfig(**fields), adapter.tensors))
    assert "modules_to_save" in str(error)


class Nested(nnx.Module):
    """A layer whose path is the end of another layer's path."""

    def __init__(self):
        self.proj = linear(IN, IN, use_bias=False, dtype=jnp.float32, rngs=fast_rngs(0))
        self.inner = nnx.List([nnx.Dict(proj=linear(IN, IN, use_bias=False, dtype=jnp.float32, rngs=fast_rngs(1)))])

    def __call__(self, x):
        return self.inner[0]["proj"](self.proj(x))


def test_a_path_that_ends_another_path_targets_only_itself(tmp_path):
    model = adapted(Nested(), target_modules="proj")  # as a regular expression: the outer layer alone
    assert model.moe_lora_config.target_modules == ["proj"]
    save_pretrained(model, tmp_path)
    back = load(Nested(), tmp_path)
    assert_same_leaves(leaves(back, MoeLoraParam), leaves(model, MoeLoraParam))


def test_a_model_without_an_adapter_cannot_be_saved(tmp_path):
    with pytest.raises(CheckpointError, match="no adapter"):
        save_pretrained(Toy(), tmp_path / "out")
    with pytest.raises(CheckpointError, match="no adapter"):
        to_adapter(Toy())
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_a_save_that_fails_keeps_the_old_checkpoint(tmp_path):
    save_pretrained(adapted(), tmp_path / "out")
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    model = adapted(top_k=1)
    model.layers[0].q_proj.lora_a = MoeLoraParam(jnp.zeros((3, 2, IN + 1)))
    with pytest.raises(CheckpointError, match="layers.0.q_proj"):
        save_pretrained(model, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before


def test_training_after_loading_continues_from_the_same_gradients(tmp_path):
    model = adapted(Toy(layers=1), top_k=2, target_modules=["q_proj"])
    save_pretrained(model, tmp_path)

    def gradients(model):
        graph, adapter, rest = nnx.split(model, MoeLoraParam, ...)
        loss = lambda adapter: jnp.sum(nnx.merge(graph, adapter, rest)(inputs()) ** 2)  # noqa: E731
        return {str(p): np.asarray(v[...]) for p, v in nnx.to_flat_state(jax.jit(jax.grad(loss))(adapter))}

    found = gradients(load(Toy(layers=1), tmp_path))
    assert all(g.any() for g in found.values())
    assert_same_leaves(found, gradients(model))
