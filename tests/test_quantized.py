"""Base weights in 8 and 4 bits: against the codes written out in numpy, and what is trained on them in PEFT."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jax.test_util import check_grads

import moe_lora_interop.peft_tuner  # noqa: F401  registers MOE_LORA
import moe_lora_jax as mlj
from moe_lora_interop import CheckpointError, ConfigError
from moe_lora_jax.compiled import estimated_cycles, topology
from moe_lora_jax.models import quantized
from moe_lora_jax.models.quantized import QuantizedEmbed, QuantizedLinear
from tests.hf import make_model, save_model
from tests.toy import Toy, assert_same_leaves, leaves

IDS = np.random.default_rng(0).integers(3, 90, (3, 8))
KINDS = ("int8", "int4", "nf4")
# The quantiles of QLoRA (arXiv:2305.14314, appendix E)
NF4 = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)
BLOCK = 8


@pytest.fixture(autouse=True)
def needs_qwix(request):
    if "without_qwix" not in request.node.name:
        pytest.importorskip("qwix", reason="needs the extra quant (pip install 'moe-lora-jax[quant]')")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(make_model("llama_tied"), tmp_path_factory.mktemp("base"))


def quantized_base(base, kind, **options):
    return mlj.quantize_base(mlj.load_base_model(base, **options), kind, block_size=BLOCK)


def in_blocks(weight, axis):
    """[blocks, BLOCK, columns] of a matrix whose blocks lie along `axis`."""
    weight = weight if axis == 0 else weight.T
    return weight.reshape(-1, BLOCK, weight.shape[1])


def expected_steps(kind, weight, axis):
    """The widest gap between two neighbouring values that a block can hold: twice what rounding may cost."""
    largest = np.abs(in_blocks(weight, axis)).max(1, keepdims=True)
    gap = {"int8": 1 / 127, "int4": 1 / 7, "nf4": np.diff(NF4).max()}[kind]
    return gap * largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_is_rounded_to_the_nearest_value_of_its_block(kind, axis):
    weight = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
    stored = quantized.QuantizedWeight(jnp.asarray(weight), kind, BLOCK, axis)
    scales = np.asarray(stored.scales[...], np.float32)
    assert scales.shape == ((3, 16) if axis == 0 else (24, 2)) and stored.scales.dtype == jnp.bfloat16
    values = np.asarray(stored._dequantized(stored.codes[...], stored.scales[...]))
    codes = np.asarray(stored.codes[...]).astype(int)
    levels = NF4[codes] if kind == "nf4" else codes
    np.testing.assert_allclose(values, levels * np.repeat(scales, BLOCK, axis), rtol=1e-5)
    error = in_blocks(np.abs(values - weight), axis)
    # half a step, and the scale's own rounding to 8 bits
    assert (error <= expected_steps(kind, weight, axis) * 0.5 + 2**-8 * np.abs(in_blocks(weight, axis)) + 1e-6).all()
    assert len(np.unique(codes)) > (100 if kind == "int8" else 12)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_with_the_rounded_weight(kind):
    rngs, x = nnx.Rngs(0), jnp.asarray(np.random.default_rng(0).normal(size=(5, 16)), jnp.float32)
    linear, embed = nnx.Linear(16, 8, rngs=rngs), nnx.Embed(20, 16, rngs=rngs)
    linear.bias[...] = jnp.arange(8.0)
    ours, table = QuantizedLinear(linear, kind, BLOCK), QuantizedEmbed(embed, kind, BLOCK)
    rounded = ours.kernel.matmul(jnp.eye(16))
    np.testing.assert_allclose(ours(x), x @ rounded + jnp.arange(8.0), rtol=1e-4, atol=1e-4)
    rows = np.asarray(table(jnp.arange(20)))
    ids = np.array([[3, 0], [19, 3]])
    np.testing.assert_array_equal(table(jnp.asarray(ids)), rows[ids])
    np.testing.assert_allclose(table.attend(x), x @ rows.T, rtol=1e-4, atol=1e-4)
    check_grads(ours, (x,), order=1, modes=["fwd", "rev"], atol=1e-2, rtol=1e-2)


def test_the_weight_is_not_kept_in_full_for_the_gradient():
    """Measured under a scan: XLA:CPU undoes rematerialisation in straight code."""
    layers, width = 8, 512
    made = [nnx.split(QuantizedLinear(nnx.Linear(width, width, rngs=nnx.Rngs(i)), "nf4", 64)) for i in range(layers)]
    graph, stacked = made[0][0], jax.tree.map(lambda *each: jnp.stack(each), *(state for _, state in made))

    def loss(x, stacked):
        return jax.lax.scan(lambda x, state: (jnp.tanh(nnx.merge(graph, state)(x)), None), x, stacked)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((4, width)), stacked).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.6 * layers * width * width * 4

    _, of_input = jax.vjp(nnx.merge(*made[0]), jnp.ones((4, width)))  # what waits for the backward pass, anywhere
    kept = [leaf for leaf in jax.tree.leaves(of_input) if leaf.size >= width * width]
    assert [leaf.dtype for leaf in kept] == [jnp.uint4]


def test_two_codes_of_four_bits_share_a_byte_in_memory():
    """What JAX itself reports counts a byte for each."""
    code = """
import resource, jax, jax.numpy as jnp
from pathlib import Path
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
make = jax.jit(lambda k: jnp.full((16, 1024, 1024), k.astype(jnp.uint4)))
jax.jit(lambda k: k + 1)(jnp.int32(1)).block_until_ready()
before = resident()
made = [make(jnp.int32(k)).block_until_ready() for k in range(8)]
print((resident() - before) / (8 * 16 * 2**20))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.4 < float(done.stdout) < 0.65


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_on_it_loads_in_peft_on_the_base_in_full(base, tmp_path, kind):
    model = quantized_base(base, kind)
    frozen, before = leaves(model), float(loss_of(model))
    config = mlj.MoeLoraConfig(r=4, num_experts=3, top_k=2, target_modules="all-linear")
    mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(0))
    assert isinstance(model.model.layers[0].mlp.up_proj.base_layer, QuantizedLinear)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=mlj.MoeLoraParam)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_of, argnums=nnx.DiffState(0, mlj.MoeLoraParam))(model))

    for _ in range(4):
        step(model, optimizer)
    assert float(loss_of(model)) < 0.97 * before
    unchanged = {name.replace("base_layer.", ""): value for name, value in leaves(model).items()}
    assert_same_leaves({name: unchanged[name] for name in frozen}, frozen)

    mlj.save_pretrained(model, tmp_path)
    in_full = mlj.load_adapter(mlj.load_base_model(base), tmp_path)
    expected = np.asarray(in_full(IDS))
    twin = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    with torch.no_grad():
        found = twin(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())

    again = mlj.load_adapter(quantized_base(base, kind), tmp_path)
    np.testing.assert_array_equal(again(IDS), model(IDS))
    if kind == "int8":  # near enough to be compared with the base in full
        np.testing.assert_allclose(model(IDS), expected, atol=0.05 * np.abs(expected).max())


def loss_of(model):
    return optax.softmax_cross_entropy_with_integer_labels(model(IDS)[:, :-1], IDS[:, 1:]).mean()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_scanned_layers_compute_the_same(base, kind):
    plain, scanned = quantized_base(base, kind), quantized_base(base, kind, scan_layers=True)
    expected = np.asarray(plain(IDS))
    np.testing.assert_allclose(scanned(IDS), expected, atol=1e-5 * np.abs(expected).max())


def test_a_feed_forward_mixture_and_a_bank_stand_on_it_too(base):
    config = mlj.MoeLoraConfig(r=2, num_experts=2, scope="ffn", target_modules=["up_proj"], init_lora_weights=False)
    model = quantized_base(base, "int8")
    before = np.asarray(model(IDS))
    mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(0))
    assert np.abs(np.asarray(model(IDS)) - before).max() > 1e-3
    table = mlj.summary(model)
    assert (
        table.base_parameters
        == mlj.summary(mlj.load_adapter(mlj.load_base_model(base), mlj.to_adapter(model))).base_parameters
    )
    np.testing.assert_array_equal(mlj.remove_moe_lora(model)(IDS), before)

    linear = mlj.MoeLoraConfig(r=2, num_experts=2, target_modules=["up_proj"], init_lora_weights=False)
    adapter = mlj.to_adapter(mlj.apply_moe_lora(quantized_base(base, "int8"), linear, rngs=nnx.Rngs(0)))
    bank = mlj.AdapterBank(model, {"a": adapter})
    bank.select(["__base__", "a", "__base__"])
    found = np.asarray(bank.model(IDS))
    np.testing.assert_allclose(found[[0, 2]], before[[0, 2]], atol=1e-5 * np.abs(before).max())
    assert np.abs(found[1] - before[1]).max() > 1e-3


@pytest.mark.parametrize("axis", [0, 1])
def test_nf4_is_the_same_number_by_table_and_by_bits(axis):
    """The second is what other devices than CPUs compute."""
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 16, (6 * BLOCK, 4 * BLOCK)), jnp.uint4)
    shape = (6, 4 * BLOCK) if axis == 0 else (6 * BLOCK, 4)
    scales = jnp.asarray(rng.uniform(0.1, 2, shape), jnp.float32)
    by_table = quantized._by_table(codes, scales, "nf4")
    np.testing.assert_array_equal(quantized._by_bits(codes, scales), by_table)
    expected = NF4[np.asarray(codes, int)] * np.repeat(np.asarray(scales), BLOCK, axis)
    np.testing.assert_allclose(by_table, expected, rtol=1e-6)


def test_nf4_costs_little_more_than_int4_on_a_tpu():
    """Cycles of the TPU's compiler, forwards and backwards; 11 times int4's with a table."""
    pytest.importorskip("libtpu", reason="needs the TPU's compiler: the extra plan")
    where = SingleDeviceSharding(topology("v6e:1x1").devices[0])

    def cycles(kind: str) -> int:
        linear = nnx.Linear(1024, 1024, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(QuantizedLinear(linear, kind, 32))

        def both(state, x, dy):
            y, vjp = jax.vjp(nnx.merge(graphdef, state), x)
            return y, vjp(dy)

        x = jax.ShapeDtypeStruct((2048, 1024), jnp.bfloat16)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), (state, x, x))
        return estimated_cycles(jax.jit(both).lower(*shapes).compile().as_text()).total

    assert cycles("nf4") <= 1.3 * cycles("int4")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_without_qwix_the_extra_is_named(monkeypatch, base):
    monkeypatch.setitem(sys.modules, "qwix", None)
    model = mlj.load_base_model(base)
    before = leaves(model)
    with pytest.raises(ImportError, match=r"need qwix: pip install 'moe-lora-jax\[quant\]'"):
        mlj.quantize_base(model, "nf4")
    assert_same_leaves(leaves(model), before)


def test_what_does_not_fit_leaves_the_model_alone():
    model = Toy()  # widths 6 and 8
    before = leaves(model)
    with pytest.raises(ConfigError) as error:
        mlj.quantize_base(model, "nf4", block_size=8)
    named = {problem.split(":")[0] for problem in error.value.problems}
    assert named == {"layers.0.q_proj", "layers.0.mlp.up_proj", "layers.1.q_proj", "layers.1.mlp.up_proj", "lm_head"}
    assert all("has 6 inputs, expected a multiple of block_size 8" in problem for problem in error.value.problems)
    with pytest.raises(ConfigError, match="kind: found 'int2', expected one of int8, int4, nf4"):
        mlj.quantize_base(model, "int2")
    with pytest.raises(ConfigError, match="found no nnx.Linear or nnx.Embed"):
        mlj.quantize_base(nnx.Dict({}), "nf4")
    assert_same_leaves(leaves(model), before)


def test_a_model_with_an_adapter_is_refused():
    model = mlj.apply_moe_lora(Toy(), mlj.MoeLoraConfig(target_modules=["up_proj"]), rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match="quantise the base first"):
        mlj.quantize_base(model, "int8", block_size=2)


def test_embeddings_can_be_left(base):
    model = mlj.quantize_base(mlj.load_base_model(base), "nf4", block_size=BLOCK, embeddings=False)
    assert isinstance(model.model.embed_tokens, nnx.Embed)
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)
