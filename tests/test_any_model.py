"""Models that are not ours: any layer that is a matrix can carry experts, and templates give it its PEFT name."""

import string

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_lora_interop.peft_tuner as tuner
import moe_lora_jax as mlj
from moe_lora_interop import CheckpointError, ConfigError
from moe_lora_jax.layers.linear_maps import linear_map
from tests.hf import make_model, save_model
from tests.nnx_llama import SPEC, Llama, load
from tests.toy import assert_same_leaves, leaves

IDS = np.random.default_rng(0).integers(3, 90, (2, 7))
SIZES = dict(r=2, lora_alpha=4, num_experts=3, top_k=2, init_lora_weights=False)
SCOPES = {
    "linear": dict(target_modules="all-linear"),
    "ffn": dict(scope="ffn", target_modules=["gate_proj", "down_proj", "q_proj"], num_experts_pattern={"q_proj": 1}),
    "ffn_last_untargeted": dict(scope="ffn", target_modules=["up_proj"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(make_model("llama", rms_norm_eps=1e-6), tmp_path_factory.mktemp("base"))


def applied(base, **fields):
    config = mlj.MoeLoraConfig(**SIZES, **fields)
    model = mlj.apply_moe_lora(load(base), config, rngs=nnx.Rngs(0), spec=SPEC)
    return model, np.asarray(model(IDS))


def peft_logits(base, adapter):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(theirs, adapter).eval()(torch.tensor(IDS)).logits.numpy()


def test_the_model_of_the_tests_is_the_one_of_transformers(base):
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(base)(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(load(base)(IDS), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_trained_there_loads_in_peft(base, tmp_path, scope):
    model, before = applied(base, **SCOPES[scope])
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=mlj.MoeLoraParam)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(IDS)[:, :-1], IDS[:, 1:]).mean()

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, mlj.MoeLoraParam))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(3)]
    assert losses[-1] < losses[0]
    mlj.save_pretrained(model, tmp_path)
    expected = np.asarray(model(IDS))
    scale = np.abs(expected).max()
    assert np.abs(expected - before).max() > 1e-2 * scale
    np.testing.assert_allclose(peft_logits(base, tmp_path), expected, atol=2e-5 * scale)

    loaded = mlj.load_adapter(load(base), tmp_path, spec=SPEC)
    assert_same_leaves(leaves(loaded, mlj.MoeLoraParam), leaves(model, mlj.MoeLoraParam))


@pytest.mark.parametrize("scope", SCOPES)
def test_what_peft_saves_loads_here(base, tmp_path, scope):
    torch.manual_seed(0)
    config = tuner.MoeLoraConfig(**SIZES, **SCOPES[scope], task_type="CAUSAL_LM")
    twin = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    twin.save_pretrained(tmp_path)
    model = mlj.load_adapter(load(base), tmp_path, spec=SPEC)
    expected = peft_logits(base, tmp_path)
    np.testing.assert_allclose(model(IDS), expected, atol=2e-5 * np.abs(expected).max())


def test_removing_gives_the_base_back(base):
    model, _ = applied(base, **SCOPES["ffn"])
    assert_same_leaves(leaves(mlj.remove_moe_lora(model)), leaves(load(base)))
    assert not hasattr(model, "moe_lora_names")


def test_the_table_of_an_adapter_has_the_modules_of_hugging_face(base):
    model, _ = applied(base, **SCOPES["ffn"])
    table = mlj.summary(model)
    assert {row.modules for row in table.rows} == {"q_proj", "gate_proj", "down_proj", "mlp"}
    assert sum(row.parameters for row in table.rows) == sum(v.size for v in leaves(model, mlj.MoeLoraParam).values())


# --- layers as matrices ---------------------------------------------------------------------------------------------


def check_map(layer, x):
    """The layer is the matrix that its map says: unit vectors through the map give the columns of one matrix."""
    found, y = linear_map(layer, {}), layer(x)
    flat = np.asarray(found.flatten(x))
    assert flat.shape[1] == found.in_features
    zero = layer(jnp.zeros_like(x))  # the bias
    last = range(-len(found.in_axes), 0)

    def column(unit):  # the same unit vector at every token
        probe = jnp.moveaxis(jnp.zeros_like(x), found.in_axes, last) + unit.reshape(found.in_shape)
        return layer(jnp.moveaxis(probe, last, found.in_axes)) - zero

    columns = np.asarray(jax.vmap(column)(jnp.eye(found.in_features)))
    restored = [np.asarray(found.restore(jnp.ones((len(flat), 1)) * jnp.arange(found.out_features), y.shape))]
    order = restored[0].astype(int)  # which output of the matrix stands where
    matrix = np.zeros((found.in_features, found.out_features))
    for i, column in enumerate(columns):
        matrix[i][order.ravel()] = column.ravel()
    delta = found.restore(jnp.asarray(flat @ matrix), y.shape)
    np.testing.assert_allclose(delta, y - zero, atol=1e-4)


LAYERS = {
    "linear": lambda rngs: (nnx.Linear(6, 5, rngs=rngs), (2, 3, 6)),
    "heads": lambda rngs: (nnx.LinearGeneral(6, (2, 4), rngs=rngs), (2, 3, 6)),
    "from_heads": lambda rngs: (nnx.LinearGeneral((2, 3), 5, axis=(-2, -1), rngs=rngs), (4, 2, 3)),
    "in_another_order": lambda rngs: (nnx.LinearGeneral((2, 3), 5, axis=(-1, 1), rngs=rngs), (4, 2, 5, 3)),
    "einsum": lambda rngs: (nnx.Einsum("BTD,DNH->BTNH", (6, 2, 4), (2, 4), rngs=rngs), (2, 3, 6)),
    "kernel_in_another_order": lambda rngs: (nnx.Einsum("BTNH,HND->BTD", (3, 2, 5), rngs=rngs), (2, 4, 2, 3)),
    "heads_in_front": lambda rngs: (nnx.Einsum("BTD,NDH->BNTH", (2, 6, 4), rngs=rngs), (2, 3, 6)),
    "dots": lambda rngs: (nnx.Einsum("...D,DNH->N...H", (6, 2, 4), rngs=rngs), (2, 3, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_matrix_that_its_map_says(name):
    layer, shape = LAYERS[name](nnx.Rngs(0))
    check_map(layer, jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32))


@settings(max_examples=10, deadline=None)
@given(st.permutations("ij"), st.permutations("ijkm"), st.permutations("bkm"))
def test_any_order_of_an_einsum(given_axes, kernel, result):
    kept = [c for c in result if c in "b"]
    left = "".join(kept + list(given_axes))
    sizes = dict(b=2, i=2, j=3, k=4, m=3)
    shape = tuple(sizes[c] for c in kernel)
    layer = nnx.Einsum(f"{left},{''.join(kernel)}->{''.join(result)}", shape, rngs=nnx.Rngs(0))
    check_map(layer, jnp.asarray(np.random.default_rng(0).normal(size=[sizes[c] for c in left]), jnp.float32))


@pytest.mark.parametrize(
    "equation", ["BTNH,NHD->BTND", "BTD,DNH->TBNH", "BTD,DNH->BTN", "BD,DDH->BH", "BTD,...DH->BTH", "BT,NH->BTNH"]
)
def test_an_einsum_that_is_no_matrix_is_no_linear_layer(equation):
    labels = [c for c in equation.split(",")[1].split("->")[0] if c in string.ascii_letters]
    assert mlj.LinearMap.of_einsum(equation, (2,) * (len(labels) + ("..." in equation))) is None


def test_layers_that_are_no_matrix_are_not_found():
    assert linear_map(nnx.LinearGeneral(2, 3, batch_axis={0: 4}, rngs=nnx.Rngs(0)), {}) is None
    assert linear_map(nnx.Embed(2, 3, rngs=nnx.Rngs(0)), {}) is None


# --- the wrapper in place of the layer ------------------------------------------------------------------------------


def test_settings_of_the_layer_can_be_read_through_and_weights_cannot(base):
    model, _ = applied(base, target_modules="all-linear")
    out = model.blocks[0].attention.out
    assert isinstance(out, mlj.MoeLoraLinear) and out.kernel_shape == (4, 8, 32)
    for weight in ("kernel", "einsum_op", "no_such_thing"):
        with pytest.raises(AttributeError, match=f"no attribute '{weight}'; weights are at its base_layer"):
            getattr(out, weight)


def test_further_arguments_reach_the_layer(base):
    model, _ = applied(base, target_modules=["q_proj"])
    x = jnp.ones((1, 2, 32))
    query = model.blocks[0].attention.query
    np.testing.assert_array_equal(query(x, out_sharding=None), query(x))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ({"a.{l}": "b.{k}"}, r"'a\.\{l\}' -> 'b\.\{k\}', expected the same fields"),
        ({"a.{l}.{l}": "b.{l}"}, "expected the same fields once"),
    ],
)
def test_templates_must_have_the_same_fields(names, problem):
    with pytest.raises(ConfigError, match=problem):
        mlj.ModelSpec(names=names)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ({"blocks.{l}.attention.query": "q_{l}"}, "blocks.0.attention.key: no template"),
        ({"blocks.{l}.attention.{p}": "{l}.{p}", "blocks.{l}.{b}.{p}": "{b}.{l}.{p}"}, "expected one name"),
        ({"blocks.{l}.attention.query": "head", "head": "head", "blocks.1.attention.key": "head"}, "expected the same"),
        ({"blocks.0.attention.query": "q", "blocks.1.attention.query": "q"}, "q: found as the name of .*expected one"),
    ],
)
def test_names_that_miss_a_target_or_give_two(base, names, problem):
    model = load(base)
    before = leaves(model)
    with pytest.raises(ConfigError, match=problem):
        spec = mlj.ModelSpec(names=names, layers=SPEC.layers)
        mlj.apply_moe_lora(model, mlj.MoeLoraConfig(target_modules="all-linear"), rngs=nnx.Rngs(0), spec=spec)
    assert_same_leaves(leaves(model), before)


def test_without_a_hook_a_layer_of_another_class_is_not_found():
    with pytest.raises(ConfigError, match="'up': no linear layer of this name"):
        mlj.apply_moe_lora(Llama(), mlj.MoeLoraConfig(target_modules=["up", "query"]), rngs=nnx.Rngs(0))


def test_a_block_of_layers_that_are_not_last_axis_to_last_axis_is_refused():
    fields = dict(scope="ffn", target_modules=["q_proj"], num_experts=2)
    with pytest.raises(ConfigError, match="q_proj: LinearMap.*expected a layer from the last axis"):
        mlj.apply_moe_lora(Llama(), mlj.MoeLoraConfig(**fields), rngs=nnx.Rngs(0), spec=SPEC)


def test_an_adapter_for_another_model_names_what_is_missing_in_its_own_names(base, tmp_path):
    model, _ = applied(base, target_modules=["down_proj"])
    mlj.save_pretrained(model, tmp_path)
    with pytest.raises(CheckpointError, match="model.layers.0.mlp.down_proj: the base model has no linear layer"):
        mlj.load_adapter(load(base), tmp_path)


def test_it_runs_under_jit_and_its_structure_is_hashable(base):
    model, eager = applied(base, target_modules="all-linear")
    graph, state = nnx.split(model)
    hash(graph)
    np.testing.assert_allclose(
        jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, IDS), eager, atol=1e-5 * np.abs(eager).max()
    )
