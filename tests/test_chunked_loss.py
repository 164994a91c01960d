"""The loss by chunks of hidden states: against a formula in float64, and against the loss of whole logits."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_training import LLAMA, arrays, tiny_model, token_data

import moe_lora_jax as mlj
from moe_lora_jax.models import CausalLM, DecoderConfig
from moe_lora_jax.train.batches import collate
from moe_lora_jax.train.chunked_loss import _chunk, loss_of_hidden, model_loss
from moe_lora_jax.train.evaluation import mean_loss, split_for_evaluation
from moe_lora_jax.train.losses import next_token_loss
from moe_lora_jax.train.step import Batch, make_train_step, merge_back, split_model

BATCH, SEQ, VOCAB, WIDTH = 3, 13, LLAMA["vocab_size"], LLAMA["hidden_size"]
GEMMA = {
    **LLAMA,
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
HEADS = {
    "untied": {**LLAMA, "tie_word_embeddings": False},
    "tied": {**LLAMA, "tie_word_embeddings": True},
    "softcap": GEMMA,
}
rng = np.random.default_rng(0)


def head_of(kind: str, dtype: str) -> CausalLM:
    """A model whose logits are of order 1 to 10."""
    model = CausalLM(DecoderConfig.from_hf({**HEADS[kind], "dtype": dtype}), rngs=nnx.Rngs(0))
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(VOCAB, WIDTH)) / 2, dtype)
    if model.config.tie_word_embeddings:
        model.model.embed_tokens.embedding[...] = weight
    else:
        model.lm_head.kernel[...] = weight.T
    return model


def rows(dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states, ids and what counts: a row where nothing does, and an id outside the vocabulary that does not."""
    hidden = jnp.asarray(rng.normal(size=(BATCH, SEQ, WIDTH)), dtype)
    ids, counted = rng.integers(0, VOCAB, (BATCH, SEQ)), rng.random((BATCH, SEQ)) < 0.6
    counted[0], counted[1, -1] = False, True
    ids[2, 3], counted[2, 3] = 10 * VOCAB, False
    return hidden, jnp.asarray(ids), jnp.asarray(counted)


def formula(model: CausalLM, hidden, ids, counted) -> tuple[float, np.ndarray]:
    """The loss and its gradient for the hidden states, in float64."""
    tied, cap = model.config.tie_word_embeddings, model.config.final_logit_softcapping
    weight = model.model.embed_tokens.embedding[...].T if tied else model.lm_head.kernel[...]
    weight, hidden, ids = np.asarray(weight, np.float64), np.asarray(hidden, np.float64), np.asarray(ids)
    z = hidden @ weight
    slope = 1.0
    if cap is not None:
        z = cap * np.tanh(z / cap)
        slope = 1 - (z / cap) ** 2
    places = [(b, t) for b, t in zip(*np.nonzero(np.asarray(counted)), strict=True) if t > 0]
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    dz = np.zeros_like(z)
    for b, t in places:
        dz[b, t - 1] = np.exp(log_p[b, t - 1]) - np.eye(VOCAB)[ids[b, t]]
    return -np.mean([log_p[b, t - 1, ids[b, t]] for b, t in places]), (dz * slope / len(places)) @ weight.T


def in_chunks(model, ids, counted, chunk):
    return jax.jit(jax.value_and_grad(lambda h: loss_of_hidden(h, model.scorer(), ids, counted, chunk=chunk).mean))


def whole(model, ids, counted):
    return jax.jit(jax.value_and_grad(lambda h: next_token_loss(model.head(h), ids, counted).mean))


@pytest.mark.parametrize("chunk", [1, 3, 8, SEQ, 50])
@pytest.mark.parametrize("kind", HEADS)
def test_chunks_are_the_formula_and_the_whole(kind, chunk):
    model, (hidden, ids, counted) = head_of(kind, "float32"), rows("float32")
    expected, slope = formula(model, hidden, ids, counted)
    loss, gradient = in_chunks(model, ids, counted, chunk)(hidden)
    other, other_gradient = whole(model, ids, counted)(hidden)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, atol=1e-6 * np.abs(slope).max())
    np.testing.assert_allclose(gradient, other_gradient, atol=1e-6 * np.abs(slope).max())
    assert not np.any(np.asarray(gradient)[slope == 0])


@pytest.mark.parametrize("kind", HEADS)
def test_in_bfloat16_chunks_are_closer_to_the_formula_than_whole_logits(kind):
    """Those are rounded to bfloat16; here only the gradient is."""
    model, (hidden, ids, counted) = head_of(kind, "bfloat16"), rows("bfloat16")
    expected, slope = formula(model, hidden, ids, counted)
    found = {name: f(hidden) for name, f in (("chunks", in_chunks(model, ids, counted, 4)),
                                            ("whole", whole(model, ids, counted)))}  # fmt: skip
    off = {name: abs(float(loss) - expected) for name, (loss, _) in found.items()}
    turned = {name: np.linalg.norm(np.asarray(g, np.float64) - slope) for name, (_, g) in found.items()}
    assert off["chunks"] < 1e-6 * expected < off["whole"]
    assert turned["chunks"] < turned["whole"] and turned["chunks"] < 2**-8 * np.linalg.norm(slope)


def test_a_head_that_trains_gets_the_gradient_of_whole_logits():
    model, (hidden, ids, counted) = head_of("untied", "float32"), rows("float32")
    graph, state = nnx.split(model)

    def loss(state, chunk):
        copy = nnx.merge(graph, state, copy=True)
        if chunk is None:
            return next_token_loss(copy.head(hidden), ids, counted).mean
        return loss_of_hidden(hidden, copy.scorer(), ids, counted, chunk=chunk).mean

    found, expected = (jax.grad(loss)(state, chunk)["lm_head"]["kernel"][...] for chunk in (4, None))
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_a_target_outside_the_vocabulary_is_nan_in_any_chunk(wrong):
    model, (hidden, ids, counted) = head_of("tied", "float32"), rows("float32")
    for column in (1, SEQ - 1):
        ids_, counted_ = ids.at[1, column].set(wrong), counted.at[1, column].set(True)
        assert np.isnan(loss_of_hidden(hidden, model.scorer(), ids_, counted_, chunk=4).mean)


def test_nothing_that_counts_is_zero_with_zero_gradient():
    model, (hidden, ids, counted) = head_of("tied", "float32"), rows("float32")
    loss, gradient = in_chunks(model, ids, jnp.zeros_like(counted), 4)(hidden)
    assert loss == 0 and not np.any(gradient)


def batch_of(examples: int, micro: int) -> Batch:
    batch, _ = collate(token_data(examples).examples, examples, (24,), 0)
    return jax.tree.map(lambda x: x.reshape(micro, examples // micro, -1), batch)


def step_of(model: CausalLM, chunk: int | None):
    model.train()
    optimizer = optax.sgd(1.0)
    graphdef, state, frozen = split_model(model, mlj.MoeLoraParam, optimizer)
    return make_train_step(graphdef, optimizer, model.moe_lora_config, loss_chunk=chunk), state, frozen


@pytest.mark.parametrize(("micro", "scan"), [(1, False), (4, True)])
def test_a_step_in_chunks_is_the_step(micro, scan):
    fields = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.2}
    found = []
    for chunk in (None, 5):
        model = tiny_model(**fields)
        model.model.scan_layers = scan
        step, state, frozen = step_of(model, chunk)
        state, metrics = step(state, frozen, batch_of(8, micro))
        merge_back(model, state, frozen)
        found.append((metrics, arrays(model, mlj.MoeLoraParam)))
    (whole, expected), (chunked, weights) = found
    for name in ("loss", "lm_loss", "load_balancing_loss", "router_z_loss", "grad_norm"):
        np.testing.assert_allclose(getattr(chunked, name), getattr(whole, name), rtol=1e-5)
    assert chunked.router.keys() == whole.router.keys() and chunked.counted_tokens == whole.counted_tokens
    for path, array in expected.items():
        np.testing.assert_allclose(weights[path], array, atol=1e-6)


def largest_logits(chunk: int | None) -> int:
    """Elements of the largest array in a step's program that has an axis as long as the vocabulary."""
    step, state, frozen = step_of(tiny_model(), chunk)
    text = step.lower(state, frozen, batch_of(8, 2)).compile().as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\[([\d,]+)\]", text)}
    return max(math.prod(shape) for shape in shapes if VOCAB in shape)


def test_the_program_holds_no_logits_of_all_tokens():
    tokens = 4 * 24
    assert largest_logits(None) == tokens * VOCAB
    assert largest_logits(6) == max(4 * 6, WIDTH) * VOCAB  # the embeddings' table is there too


def test_evaluation_in_chunks():
    model = tiny_model()
    split = split_for_evaluation(model)
    data = token_data(10)
    (whole, counted), (chunked, same) = (
        mean_loss(*split, data, batch_size=4, pad_id=0, loss_chunk=chunk) for chunk in (None, 5)
    )
    assert chunked == pytest.approx(whole, rel=1e-6) and counted == same
    assert mlj.train.evaluate(model, data, batch_size=4) == whole


def test_a_head_with_an_adapter_is_called_for_its_logits():
    model = CausalLM(DecoderConfig.from_hf(HEADS["untied"]), rngs=nnx.Rngs(0))
    fields = {"r": 2, "num_experts": 3, "top_k": 2, "target_modules": ["lm_head"], "init_lora_weights": False}
    mlj.apply_moe_lora(model, mlj.MoeLoraConfig(**fields), rngs=nnx.Rngs(0))
    batch = jax.tree.map(lambda x: x[0], batch_of(4, 1))
    arguments = (batch.input_ids, batch.loss_mask, batch.arguments())
    loss, router = model_loss(model, *arguments, chunk=5, return_router=True)
    expected = next_token_loss(model(batch.input_ids, batch.attention_mask), batch.input_ids, batch.loss_mask)
    assert loss.mean == expected.mean and list(router) == ["lm_head"]


@pytest.mark.parametrize(
    ("rows", "length", "vocab", "chunk"),
    [
        (8, 256, 32768, 256),  # 256 MiB: whole
        (8, 257, 32768, 256),
        (1, 4096, 128256, 512),
        (3, 4096, 128256, 128),
        (16, 512, 128256, 128),
    ],
)
def test_how_many_tokens_a_chunk_has(rows, length, vocab, chunk):
    assert _chunk((rows, length), vocab, None) == chunk
    mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert _chunk((2 * rows, length), 2 * vocab, mesh) == chunk
