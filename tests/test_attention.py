"""Attention in every form: the formula in numpy with its gradients, models of transformers, and what it takes."""

import functools
import logging
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import moe_lora_jax as mlj
from moe_lora_jax.models import CausalLM, load_base_model
from moe_lora_jax.models.attending import chunked, cudnn, plain, splash
from moe_lora_jax.models.attending.choice import choose
from moe_lora_jax.models.config import DecoderConfig
from moe_lora_jax.models.masks import Tokens, Visibility, real_positions, segment_positions
from tests.hf import VOCAB, Saved

BATCH, HEADS, LENGTH, HEAD_DIM, SCALE = 2, 4, 150, 8, 0.3
FORMS = {
    "plain": plain.attend,
    "chunked": chunked.attend,
    "splash": functools.partial(splash.attend, interpret=True),
    "cudnn": functools.partial(cudnn.attend, implementation="xla"),
}


@dataclass(frozen=True)
class Case:
    """real: bool [batch, seq] and segments: integers [batch, seq], if any; see `Visibility`."""

    window: int | None = None
    softcap: float | None = None
    real: np.ndarray | None = None
    segments: np.ndarray | None = None

    def sight(self, windows=None, which=None) -> Visibility:
        if self.segments is not None:
            positions = segment_positions(jnp.asarray(self.segments))
        else:
            positions = jnp.arange(LENGTH)[None] if self.real is None else real_positions(jnp.asarray(self.real))
        tokens = Tokens(jnp.arange(LENGTH), positions, None if self.segments is None else jnp.asarray(self.segments))
        real = self.counted() if self.real is not None or self.segments is not None else None
        return Visibility(tokens, tokens, real, which, (self.window,) if windows is None else windows)

    def counted(self) -> np.ndarray:
        if self.segments is not None:
            return self.segments != 0
        return np.ones((BATCH, LENGTH), bool) if self.real is None else self.real


def padded(begin, stop):
    real = np.ones((BATCH, LENGTH), bool)
    real[1, begin:stop] = False
    return real


SEGMENTS = np.stack([np.repeat([1, 2, 3, 0], [9, 130, 1, 10]), np.repeat([1, 2, 3], [60, 60, 30])])
CASES = {
    "causal": Case(),
    "window": Case(window=20),
    "window of two": Case(window=2),
    "softcap": Case(softcap=0.5),
    "left": Case(real=padded(0, 40)),
    "right": Case(real=padded(-40, None)),
    "left, window and softcap": Case(20, 0.5, real=padded(0, 40)),
    "right, window": Case(20, real=padded(-40, None)),
    "segments": Case(segments=SEGMENTS),
    "segments, window and softcap": Case(20, 0.5, segments=SEGMENTS),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in short sequences."""
    monkeypatch.setattr(chunked, "BLOCK", 32)
    monkeypatch.setattr(splash, "_block", lambda length: 128)


def numbers(kv_heads):
    """q, k, v, and the cotangent of what comes out."""
    rng = np.random.default_rng(kv_heads)
    shapes = [(BATCH, heads, LENGTH, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def by_formula(case, query, key, value, cotangent):
    """Output and the gradients of q, k and v, a head at a time, in float64; written out, without a mask's help."""
    out, *grads = (np.zeros(a.shape) for a in (query, query, key, value))
    each = HEADS // key.shape[1]
    for b in range(BATCH):
        real = case.counted()[b]
        segment = np.zeros(LENGTH) if case.segments is None else case.segments[b]
        for h in range(HEADS):
            q, k, v, d = (
                a.astype(np.float64) for a in (query[b, h], key[b, h // each], value[b, h // each], cotangent[b, h])
            )
            raw = SCALE * q @ k.T
            scores = raw if case.softcap is None else case.softcap * np.tanh(raw / case.softcap)
            weights = np.zeros_like(scores)
            for i in np.flatnonzero(real):
                first = 0 if case.window is None else max(0, i - case.window + 1)
                seen = [j for j in range(first, i + 1) if real[j] and segment[j] == segment[i]]
                exponentials = np.exp(scores[i, seen] - scores[i, seen].max())
                weights[i, seen] = exponentials / exponentials.sum()
            out[b, h] = weights @ v
            by_weight = d @ v.T
            by_score = weights * (by_weight - (by_weight * weights).sum(-1, keepdims=True)) * SCALE
            if case.softcap is not None:
                by_score *= 1 - np.tanh(raw / case.softcap) ** 2
            grads[0][b, h] += by_score @ k
            grads[1][b, h // each] += by_score.T @ q
            grads[2][b, h // each] += weights.T @ d
    return [out, *grads]


def assert_equals_formula(form, case, kv_heads, sight):
    query, key, value, cotangent = numbers(kv_heads)
    real = case.counted()[:, None, :, None]
    cotangent = cotangent * real
    attend = functools.partial(FORMS[form], scale=SCALE, softcap=case.softcap)

    @jax.jit
    def run(query, key, value, cotangent, sight):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, sight), query, key, value)
        return out, *back(cotangent)

    with jax.default_matmul_precision("highest"):
        found = [np.asarray(a) for a in run(query, key, value, cotangent, sight)]
    assert all(np.isfinite(a).all() for a in found)
    found[0] = found[0] * real  # what padding gets is not used
    for f, wanted in zip(found, by_formula(case, query, key, value, cotangent), strict=True):
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(f, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


# cuDNN has no softcap: `unable` says so
@pytest.mark.parametrize(
    ("form", "case"), [(f, c) for f in FORMS for c in CASES if f != "cudnn" or not CASES[c].softcap]
)
def test_every_form_is_the_formula(form, case):
    assert_equals_formula(form, CASES[case], 2, CASES[case].sight())


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_key_heads_serve_all_or_one_of_the_query_heads(form, kv_heads):
    assert_equals_formula(form, CASES["right, window"], kv_heads, CASES["right, window"].sight())


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_chooses_among_the_windows_of_all(form, which):
    case = Case(window=(None, 20)[which], segments=SEGMENTS)
    assert_equals_formula(form, case, 2, case.sight((None, 20), jnp.asarray(which, jnp.int32)))


# --- models

WINDOWED = ["mistral", "qwen2_windows", "qwen3_windows", "gemma2", "gemma3"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory)


def chunked_model(saved, case, monkeypatch, **switches):
    monkeypatch.setattr(chunked, "BLOCK", 4)
    return load_base_model(saved(case)[1], attention="chunked", **switches)


@pytest.mark.parametrize("case", WINDOWED)
def test_blocks_equal_transformers(case, saved, monkeypatch):
    ids = np.random.default_rng(0).integers(3, VOCAB, (2, 18))
    mask = np.ones_like(ids)
    mask[1, :7] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        as_torch = [torch.from_numpy(a) for a in (ids, mask, positions)]
        wanted = saved(case)[0](as_torch[0], attention_mask=as_torch[1], position_ids=as_torch[2]).logits.numpy()
    real, scale = mask.astype(bool), np.abs(wanted).max()
    for switches in ({}, dict(scan_layers=True)):
        graph, state = nnx.split(chunked_model(saved, case, monkeypatch, **switches))
        found = np.asarray(jax.jit(lambda state, graph=graph: nnx.merge(graph, state)(ids, mask))(state))
        np.testing.assert_allclose(found[real] / scale, wanted[real] / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("switches", [dict(scan_layers=True), dict(scan_layers=True, remat="minimal")], ids=str)
def test_gradients_through_blocks_are_those_of_all_scores(switches, saved, monkeypatch):
    ids = np.random.default_rng(0).integers(3, VOCAB, (2, 18))

    def gradients(model):
        adapter = mlj.MoeLoraConfig(r=2, num_experts=3, target_modules="all-linear", init_lora_weights=False)
        mlj.apply_moe_lora(model, adapter, rngs=nnx.Rngs(0))
        graph, adapter, rest = nnx.split(model, mlj.MoeLoraParam, ...)
        loss = lambda adapter: jnp.sum(jnp.sin(nnx.merge(graph, adapter, rest, copy=True)(ids)))  # noqa: E731
        return jax.tree.leaves(jax.jit(jax.grad(loss))(adapter))

    wanted = gradients(load_base_model(saved("gemma3")[1], attention="plain"))
    found = gradients(chunked_model(saved, "gemma3", monkeypatch, **switches))
    for f, w in zip(found, wanted, strict=True):
        np.testing.assert_allclose(f, w, rtol=0, atol=2e-5 * max(np.abs(w).max(), 1e-3))


@pytest.mark.parametrize("case", ["mistral", "gemma3"])
def test_generation_after_a_prompt_of_several_blocks(case, saved, monkeypatch):
    ids = np.random.default_rng(0).integers(3, VOCAB, (2, 11))
    mask = np.ones_like(ids)
    mask[1, :5] = 0
    wanted = mlj.generate(load_base_model(saved(case)[1], attention="plain"), ids, mask, max_new_tokens=6)
    found = mlj.generate(chunked_model(saved, case, monkeypatch), ids, mask, max_new_tokens=6)
    np.testing.assert_array_equal(found, wanted)


# --- what is chosen

LLAMA = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": True,
}


def config(dtype="bfloat16", **fields) -> DecoderConfig:
    return replace(DecoderConfig.from_hf({**LLAMA, **fields}), dtype=dtype)


def chosen(attention, config, queries=8, keys=8, *, cached=False, placed=False):
    return choose(attention, config, None, queries, keys, cached=cached, placed=placed)


def test_a_cpu_has_all_scores_of_short_rows_and_blocks_of_long_ones(caplog):
    assert chosen("auto", config()) is plain.attend
    assert chosen("auto", config(), 1, 8192, cached=True) is plain.attend
    assert chosen("auto", config(), 8192, 8192) is chunked.attend
    assert chosen("auto", config(), 8192, 8192, cached=True) is chunked.attend
    assert chosen("plain", config(), 8192, 8192) is plain.attend and chosen("chunked", config()) is chunked.attend
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("attention", "platform", "changes", "options", "problem"),
    [
        ("splash", "cpu", {}, {}, "splash cannot: platform: found cpu, expected tpu"),
        ("cudnn", "cpu", {}, {}, "cudnn cannot: platform: found cpu, expected gpu"),
        ("auto", "tpu", {"dtype": "float32"}, {}, "splash cannot: dtype: found float32, expected bfloat16"),
        (
            "auto",
            "tpu",
            {"sliding_window": 4},
            {"placed": True},
            "splash cannot: positions: found given ones in a model with windows, expected the default",
        ),
        ("auto", "gpu", {"dtype": "float32"}, {}, "cudnn cannot: dtype: found float32, expected bfloat16 or float16"),
        (
            "auto",
            "gpu",
            {},
            {},
            "cudnn cannot: GPU: found none on this machine, expected one to compile cuDNN's call for",
        ),
    ],
)
def test_what_a_kernel_cannot_do_is_said_in_one_line(
    attention, platform, changes, options, problem, caplog, monkeypatch
):
    monkeypatch.setattr("moe_lora_jax.models.attending.choice._platform", lambda mesh: platform)
    with caplog.at_level(logging.WARNING):
        assert chosen(attention, config(**changes), **options) is plain.attend
        assert chosen(attention, config(**changes), 8192, 8192, **options) is chunked.attend
    assert caplog.messages == [f"attention is plain: {problem}", f"attention is chunked: {problem}"]


def test_cudnn_has_no_softcap():
    capped = replace(config(), attn_logit_softcapping=50.0)
    assert cudnn.unable(capped, "gpu", 8) == "attn_logit_softcapping: found 50.0, expected none"


def test_a_tpu_has_splash(caplog, monkeypatch):
    monkeypatch.setattr("moe_lora_jax.models.attending.choice._platform", lambda mesh: "tpu")
    assert chosen("auto", config()).func is splash.attend
    assert chosen("auto", config(sliding_window=4)).func is splash.attend
    assert chosen("auto", config(), placed=True).func is splash.attend  # no window whose distances they would set
    assert chosen("auto", config(), 1, 8192, cached=True) is plain.attend
    assert caplog.messages == []


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="attention: found 'flash', expected one of auto, plain, chunked, cudnn, spl"):
        mlj.abstract_base_model(LLAMA, dtype="float32", attention="flash")


# --- what it takes


def temporaries(length, attention) -> int:
    """Bytes, of the gradients of hidden states, so that no head is in them."""
    model = nnx.eval_shape(lambda: CausalLM(config("float32"), rngs=nnx.Rngs(0)))
    model.model.attention = attention
    graph, state = nnx.split(model)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    loss = lambda state, ids: jnp.mean(nnx.merge(graph, state).hidden_states(ids))  # noqa: E731
    return jax.jit(jax.grad(loss)).lower(state, ids).compile().memory_analysis().temp_size_in_bytes


def test_temporaries_grow_with_the_sequence_and_not_with_its_square(monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 128)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)  # fusions are what keeps temporaries few
    try:
        short, long, longer = (temporaries(length, "auto") for length in (2048, 4096, 8192))
        squared = temporaries(2048, "plain")
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    assert longer <= 2.1 * long
    assert short <= squared / 4
