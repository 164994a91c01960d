"""The base models against transformers: same files in, same logits out, and nothing silently ignored."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from moe_lora_jax.models import CausalLM, DecoderConfig, KVCache, RopeConfig, load_base_model
from moe_lora_jax.models.rope import inverse_frequencies
from tests.hf import CASES, VOCAB, Saved, make_model

LENGTH = 24


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory)


def tokens(batch=2, length=LENGTH, seed=0):
    return np.random.default_rng(seed).integers(3, VOCAB, (batch, length))


def expected(model, ids, mask=None, positions=None):
    as_torch = [None if x is None else torch.from_numpy(np.asarray(x)) for x in (ids, mask, positions)]
    with torch.no_grad():
        return model(as_torch[0], attention_mask=as_torch[1], position_ids=as_torch[2]).logits.float().numpy()


@functools.partial(jax.jit, static_argnums=0)
def _compiled(graphdef, state, *arguments):
    return nnx.merge(graphdef, state)(*arguments)


def compiled(model, *arguments):
    """The model under jit: cheaper than op by op where shapes or dtypes are not shared with other tests."""
    return _compiled(*nnx.split(model), *arguments)


def assert_close(actual, wanted, tolerance=2e-5):
    """Relative to the scale of the logits, which must not be degenerate."""
    scale = np.abs(wanted).max()
    assert scale > 0.1 and np.isfinite(wanted).all()
    np.testing.assert_allclose(np.asarray(actual, np.float32), wanted, rtol=0, atol=tolerance * scale)


# --- logits


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_with_every_padding(case, saved):
    reference, directory = saved(case)
    model = load_base_model(directory)
    ids = tokens()
    assert_close(model(ids), expected(reference, ids))

    right, left = np.ones_like(ids), np.ones_like(ids)
    right[1, -7:] = 0
    left[1, :7] = 0
    positions = np.maximum(left.cumsum(1) - 1, 0)
    for mask, wanted in ((right, expected(reference, ids, right)), (left, expected(reference, ids, left, positions))):
        real = mask.astype(bool)
        actual = np.asarray(model(ids, mask))
        assert np.isfinite(actual).all()
        assert_close(actual[real], wanted[real])


def test_each_variation_changes_the_logits(saved):
    """The comparisons above would pass for a model that ignores what a case varies, if it made no difference."""
    ids = tokens()
    base = make_model("llama")
    for case in ("llama_theta_1e6", "llama3_rope", "llama_linear_rope"):
        varied = make_model(case)
        varied.load_state_dict(base.state_dict())
        assert np.abs(expected(varied, ids) - expected(base, ids)).max() > 0.05
    for case, other in (("mistral", {"sliding_window": None}), ("qwen2_windows", {"use_sliding_window": False})):
        wide = make_model(case, **other)
        wide.load_state_dict(saved(case)[0].state_dict())
        assert np.abs(expected(wide, ids) - expected(saved(case)[0], ids)).max() > 0.05


def test_shuffled_past_changes_the_last_logits(saved):
    """Attention matters in these models, so that the comparisons test it."""
    model = load_base_model(saved("llama")[1])
    ids = tokens()
    swapped = ids.copy()
    swapped[:, :-1] = swapped[:, -2::-1]
    assert np.abs(model(ids)[:, -1] - model(swapped)[:, -1]).max(-1).min() > 0.1


def test_explicit_positions_replace_the_counted_ones(saved):
    reference, directory = saved("llama")
    ids = tokens()
    positions = np.arange(LENGTH)[None] * 3 + np.array([[0], [5]])
    assert_close(load_base_model(directory)(ids, positions=positions), expected(reference, ids, positions=positions))


@pytest.mark.parametrize("case", ["llama", "gemma2", "qwen3"])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(case, saved):
    """Rounding differs in order between frameworks, so the bound is transformers' own distance from float32."""
    _, directory = saved(case)
    truth = make_model(case).to(torch.bfloat16).to(torch.float32)  # the same rounded weights, computed in float32
    ids = tokens(4, seed=1)
    exact = expected(truth, ids)
    theirs = expected(make_model(case).to(torch.bfloat16), ids)
    model = load_base_model(directory, dtype="bfloat16")
    ours = compiled(model, ids)
    assert ours.dtype == jnp.bfloat16 and model.config.dtype == "bfloat16"

    def error(logits):
        return np.sqrt(np.mean((np.asarray(logits, np.float32) - exact) ** 2))

    assert 0 < error(ours) <= 1.25 * error(theirs)


def test_gradients_are_finite_with_padding_and_match_torch(saved):
    reference, directory = saved("llama_biases")
    model = load_base_model(directory)
    ids = tokens()
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    graphdef, state = nnx.split(model)

    def loss(state):
        return jnp.mean(jnp.square(nnx.merge(graphdef, state)(ids, mask)) * mask[..., None])

    gradient = jax.jit(jax.grad(loss))(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    positions = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
    torch_mask = torch.from_numpy(mask)
    logits = reference(torch.from_numpy(ids), attention_mask=torch_mask, position_ids=positions).logits
    wanted = torch.autograd.grad(
        (logits.square() * torch_mask[..., None]).mean(), reference.model.layers[0].self_attn.q_proj.weight
    )[0]
    assert_close(gradient["model"]["layers"][0]["self_attn"]["q_proj"]["kernel"][...].T * 1e4, wanted.numpy() * 1e4)


# --- cache


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_cache_in_pieces_equals_one_pass(case, side, saved):
    model = load_base_model(saved(case)[1])
    ids = tokens()
    mask = np.ones_like(ids)
    if side != "none":
        mask[1, slice(0, 6) if side == "left" else slice(4, 10)] = 0
    whole = np.asarray(model(ids, None if side == "none" else mask))
    cache = KVCache.empty(model.config, 2, LENGTH + 3)
    pieces = []
    for start, stop in ((0, 8), (8, 16), (16, LENGTH)):
        part = None if side == "none" else mask[:, start:stop]
        logits, cache = model(ids[:, start:stop], part, cache=cache)
        pieces.append(np.asarray(logits))
    real = mask.astype(bool)
    assert_close(np.concatenate(pieces, axis=1)[real], whole[real], 1e-5)
    assert int(cache.length) == LENGTH


def test_a_full_cache_is_refused(saved):
    cache = KVCache.empty(load_base_model(saved("llama")[1]).config, 1, 8)
    cache = cache.reserve(np.ones((1, 6), bool), np.arange(6, dtype=np.int32)[None])
    with pytest.raises(ValueError, match="found 2 free slots of 8, expected 3"):
        cache.reserve(np.ones((1, 3), bool), np.zeros((1, 3), np.int32))
    with pytest.raises(ValueError, match="found 8 free slots of 8, expected 9"):  # under jit only the shapes are known
        jax.jit(KVCache.reserve)(cache, np.ones((1, 9), bool), np.zeros((1, 9), np.int32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(input_ids=np.ones(3, int)), r"input_ids: found shape \(3,\), expected \[batch, seq\]"),
        (dict(input_ids=np.ones((1, 3), int), attention_mask=np.ones((1, 2))), r"attention_mask: found shape \(1, 2\)"),
        (dict(input_ids=np.ones((1, 3), int), positions=np.ones((1, 2), int)), r"positions: found shape \(1, 2\)"),
    ],
)
def test_wrong_shapes_are_refused(arguments, message, saved):
    with pytest.raises(ValueError, match=message):
        load_base_model(saved("llama")[1])(**arguments)


# --- module tree


@pytest.mark.parametrize("case", ["llama", "llama_tied", "llama_biases", "qwen3", "gemma3"])
def test_paths_are_the_module_names_of_transformers(case, saved):
    reference, directory = saved(case)
    model = load_base_model(directory)
    ours = {".".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(nnx.state(model))}
    theirs = {name.rpartition(".")[0] for name, _ in reference.named_parameters()}
    assert ours == theirs
    linears = {".".join(map(str, p)) for p, m in nnx.iter_modules(model) if isinstance(m, nnx.Linear)}
    assert {name for name, m in reference.named_modules() if isinstance(m, torch.nn.Linear)} - linears <= {"lm_head"}


def test_linears_can_be_replaced_in_place(saved):
    """What an adapter does: wrap a projection, or a whole feed-forward block, and see two-dimensional activations."""
    model = load_base_model(saved("llama")[1])
    seen = []

    class Wrapper(nnx.Module):
        def __init__(self, base_layer):
            self.base_layer = base_layer

        def __call__(self, x):
            seen.append(x.shape)
            return self.base_layer(x)

    ids = tokens()
    before = model(ids)
    layer = model.model.layers[0]
    layer.self_attn.q_proj = Wrapper(layer.self_attn.q_proj)
    layer.mlp.down_proj = Wrapper(layer.mlp.down_proj)
    layer.mlp = Wrapper(layer.mlp)
    np.testing.assert_array_equal(model(ids), before)
    assert seen == [(2 * LENGTH, 32), (2 * LENGTH, 32), (2 * LENGTH, 48)]


def test_hidden_states_and_head_compose_to_the_logits(saved):
    model = load_base_model(saved("gemma2")[1])
    ids = tokens()
    hidden = model.hidden_states(ids)
    assert hidden.shape == (2, LENGTH, 32)
    np.testing.assert_array_equal(model.head(hidden), model(ids))
    np.testing.assert_allclose(model.head(hidden[:, -1]), model(ids)[:, -1], rtol=1e-5, atol=1e-6)


def test_random_construction_needs_no_files(saved):
    config = DecoderConfig.from_hf(json.loads((saved("qwen2")[1] / "config.json").read_text()))
    model = CausalLM(config, rngs=nnx.Rngs(0))
    assert compiled(model, tokens()).shape == (2, LENGTH, VOCAB)
    assert nnx.graphdef(model) == nnx.graphdef(load_base_model(saved("qwen2")[1]))


def test_inverse_frequencies_by_the_formula():
    np.testing.assert_allclose(inverse_frequencies(RopeConfig(theta=100.0), 4), [1.0, 0.1], rtol=1e-6)
    linear = RopeConfig(theta=100.0, rope_type="linear", factor=4.0)
    np.testing.assert_allclose(inverse_frequencies(linear, 4), [0.25, 0.025], rtol=1e-6)
    # Wavelengths 6.28, 62.8, 628 tokens; the first is shorter than 80/4, the last longer than 80/1.
    llama3 = RopeConfig(
        theta=1000.0,
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=80,
    )
    smooth = (80 / (2 * np.pi / 0.1) - 1) / 3
    wanted = [1.0, (1 - smooth) * 0.1 / 8 + smooth * 0.1, 0.01 / 8]
    np.testing.assert_allclose(inverse_frequencies(llama3, 6), wanted, rtol=1e-5)
