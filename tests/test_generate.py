"""Generation: greedy equals transformers token for token, draws have the right distribution, one compilation."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from moe_lora_jax.models import CausalLM, DecoderConfig, generate, load_base_model
from moe_lora_jax.models.sampling import Sampling, choose
from tests.hf import VOCAB, Saved, save_model

LENGTH, NEW = 9, 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """case -> (transformers model, ours)."""
    saved = Saved(tmp_path_factory)

    def get(case):
        reference, directory = saved(case)
        return reference, load_base_model(directory)

    return get


@pytest.fixture
def traces(monkeypatch):
    """Counts how often the model is traced (or run outside jit)."""
    counted = []
    original = CausalLM.head
    monkeypatch.setattr(CausalLM, "head", lambda self, hidden: counted.append(1) or original(self, hidden))
    return counted


def prompts(seed=0, batch=3):
    return np.random.default_rng(seed).integers(3, VOCAB, (batch, LENGTH))


def logits_of(model, ids):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state: nnx.merge(graphdef, state)(ids))(state)


def greedy_by_transformers(model, ids, mask=None, new=NEW, **options):
    with torch.no_grad():
        out = model.generate(
            torch.from_numpy(np.asarray(ids)),
            attention_mask=torch.from_numpy(np.ones_like(ids) if mask is None else mask),
            max_new_tokens=new,
            do_sample=False,
            **{"pad_token_id": 0, **options},
        ).numpy()
    return np.pad(out, ((0, 0), (0, ids.shape[1] + new - out.shape[1])), constant_values=options.get("pad_token_id", 0))


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_greedy_equals_transformers_with_left_padding(case, pair):
    reference, model = pair(case)
    ids, mask = prompts(), np.ones((3, LENGTH), np.int64)
    mask[0, :4], mask[2, :1] = 0, 0
    ids[mask == 0] = 0
    wanted = greedy_by_transformers(reference, ids, mask)
    np.testing.assert_array_equal(generate(model, ids, mask, max_new_tokens=NEW, pad_token_id=0), wanted)
    assert len(set(wanted[:, LENGTH:].ravel().tolist())) > 4  # not one token repeated


@pytest.mark.parametrize("found", [VOCAB, -1, 2**31, 2**32 + 5, 2**40])
@pytest.mark.parametrize("kind", [np.asarray, np.ndarray.tolist])
def test_an_id_is_looked_at_before_it_is_cut_to_32_bits(pair, found, kind):
    _, model = pair("llama")
    ids = np.array([[3, found]])
    for call in (model, model.hidden_states, partial(generate, model, max_new_tokens=1)):
        with pytest.raises(
            ValueError, match=rf"input_ids\[0, 1\]: token id {found}, the model's vocabulary has {VOCAB}"
        ):
            call(kind(ids))
    masked = generate(model, kind(ids), np.array([[1, 0]]), max_new_tokens=1)
    assert masked[0, 2] == generate(model, ids[:, :1], max_new_tokens=1)[0, 1]


@pytest.mark.parametrize("ids", [[[1.0, 5.7]], [[True, False]], [[2**70]]])
def test_ids_are_integers(pair, ids):
    _, model = pair("llama")
    for call in (model, partial(generate, model, max_new_tokens=1)):
        with pytest.raises(ValueError, match="input_ids: found (float|bool|object)"):
            call(ids)


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3"])
def test_right_padding_continues_each_prompt_as_if_unpadded(case, pair):
    reference, model = pair(case)
    ids, mask = prompts(1), np.ones((3, LENGTH), np.int64)
    mask[0, -5:], mask[2, -1:] = 0, 0
    tokens = generate(model, ids, mask, max_new_tokens=NEW)
    assert tokens.shape == (3, LENGTH + NEW) and tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens[:, :LENGTH], ids)
    for row in range(3):
        real = mask[row].astype(bool)
        wanted = greedy_by_transformers(reference, ids[row : row + 1, real])[0, real.sum() :]
        np.testing.assert_array_equal(tokens[row, LENGTH:], wanted)


def test_rows_that_end_are_padded_and_others_go_on(pair):
    reference, model = pair("llama")
    ids = prompts()
    free = greedy_by_transformers(reference, ids)
    eos = int(free[1, LENGTH + 2])
    wanted = greedy_by_transformers(reference, ids, eos_token_id=eos, pad_token_id=1)
    ends = [np.flatnonzero(np.append(row[LENGTH:], eos) == eos)[0] for row in wanted]
    assert ends[1] == 2 and max(ends) == NEW  # one row ends early, another never
    np.testing.assert_array_equal(generate(model, ids, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=1), wanted)
    # Several ending ids; without a pad id the first of them fills.
    several = np.asarray(generate(model, ids, max_new_tokens=NEW, eos_token_id=[VOCAB - 1, eos]))
    np.testing.assert_array_equal(np.where(wanted == 1, VOCAB - 1, wanted), several)


def test_a_first_token_that_ends_every_row_stops_at_once(pair):
    _, model = pair("llama")
    first = generate(model, prompts(), max_new_tokens=NEW)[:, LENGTH].tolist()
    out = generate(model, prompts(), max_new_tokens=NEW, eos_token_id=first, pad_token_id=2)
    assert out[:, LENGTH:].tolist() == [[token] + [2] * (NEW - 1) for token in first]


def test_ending_and_padding_ids_default_to_the_config(pair, tmp_path):
    reference, model = pair("llama")
    free = np.asarray(generate(model, prompts(), max_new_tokens=NEW))
    eos = int(free[1, LENGTH + 2])
    config = json.loads((save_model(reference, tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [eos, 5], "pad_token_id": 6}))
    configured = load_base_model(tmp_path)
    wanted = generate(model, prompts(), max_new_tokens=NEW, eos_token_id=[eos, 5], pad_token_id=6)
    assert (wanted != free).any()
    np.testing.assert_array_equal(generate(configured, prompts(), max_new_tokens=NEW), wanted)
    never_ending = generate(configured, prompts(), max_new_tokens=NEW, eos_token_id=())
    np.testing.assert_array_equal(never_ending, free)


def test_one_compilation_serves_other_prompts_weights_and_settings(traces):
    config = DecoderConfig.from_hf(
        dict(
            architectures=["LlamaForCausalLM"],
            vocab_size=53,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=None,
        )
    )
    ids = prompts() % 53
    first = generate(CausalLM(config, rngs=nnx.Rngs(0)), ids, max_new_tokens=5, eos_token_id=52)
    compiled = len(traces)
    assert compiled > 0
    second = generate(CausalLM(config, rngs=nnx.Rngs(1)), ids[::-1], max_new_tokens=5, eos_token_id=[50, 51])
    assert len(traces) == compiled and not np.array_equal(first[:, LENGTH:], second[::-1, LENGTH:])
    model = CausalLM(config, rngs=nnx.Rngs(0))
    for temperature, top_p in ((0.5, 0.5), (2.0, 0.9)):
        generate(model, ids, max_new_tokens=5, temperature=temperature, top_p=top_p, key=jax.random.key(0))
    assert len(traces) == 2 * compiled  # one more program: drawing


class Noisy(nnx.Module):
    """Stands for an adapter with dropout around a base layer."""

    def __init__(self, base_layer):
        self.base_layer = base_layer
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.base_layer(self.dropout(x))


def test_dropout_is_off_and_the_model_is_left_as_it_was(pair, tmp_path):
    reference, model = pair("llama")
    noisy = load_base_model(save_model(reference, tmp_path))
    attention = noisy.model.layers[0].self_attn
    attention.v_proj = Noisy(attention.v_proj)
    noisy.train()
    out = generate(noisy, prompts(), max_new_tokens=NEW)
    np.testing.assert_array_equal(out, generate(model, prompts(), max_new_tokens=NEW))
    assert attention.v_proj.dropout.deterministic is False
    assert attention.v_proj.dropout.rngs.count[...] == 0


def test_bfloat16_generates(pair, tmp_path):
    reference, _ = pair("llama")
    model = load_base_model(save_model(reference, tmp_path), dtype="bfloat16")
    out = generate(model, prompts(), max_new_tokens=NEW)
    logits = logits_of(model, out[:, :-1])[:, LENGTH - 1 :]
    chosen = jnp.take_along_axis(logits, out[:, LENGTH:, None], axis=-1)[..., 0]
    assert jnp.all(chosen >= logits.max(-1) - 0.1)  # the cached pass rounds differently


# --- drawing


def test_the_same_key_draws_the_same_tokens(pair):
    _, model = pair("llama")

    def draw(seed):
        return np.asarray(generate(model, prompts(), max_new_tokens=NEW, temperature=1.0, key=jax.random.key(seed)))

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()


def test_draws_follow_the_softmax_of_the_logits(pair):
    """Frequencies of the first two drawn tokens against the model's own probabilities."""
    _, model = pair("llama")
    many, temperature = 2048, 2.0
    ids = np.repeat(prompts(batch=1), many, axis=0)
    out = np.asarray(generate(model, ids, max_new_tokens=2, temperature=temperature, key=jax.random.key(0)))

    common = np.bincount(out[:, LENGTH]).argmax()
    logits = logits_of(model, np.append(ids[:1], [[common]], axis=1))

    def check(drawn, logits):
        wanted = np.asarray(jax.nn.softmax(logits / temperature))
        actual = np.bincount(drawn, minlength=VOCAB) / len(drawn)
        assert np.all(np.abs(actual - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / len(drawn)) + 1e-3)

    check(out[:, LENGTH], logits[0, -2])
    check(out[out[:, LENGTH] == common, -1], logits[0, -1])


def draws(logits, *, temperature=1.0, top_k=None, top_p=None, many=4096):
    sampling = Sampling(greedy=False, top_k=top_k, nucleus=top_p is not None)
    batch = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (many, len(logits)))
    drawn = choose(batch, sampling, jnp.float32(temperature), jnp.float32(top_p or 1.0), jax.random.key(0))
    return np.bincount(drawn, minlength=len(logits)) / many


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (dict(), [0.1, 0.4, 0.2, 0.3]),
        (dict(temperature=0.5), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (dict(top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
        (dict(top_p=1e-9), [0, 1, 0, 0]),
        (dict(top_p=1.0), [0.1, 0.4, 0.2, 0.3]),
        (dict(top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),
    ],
)
def test_temperature_top_k_and_top_p(settings, wanted):
    actual = draws(np.log([0.1, 0.4, 0.2, 0.3]), **settings)
    np.testing.assert_allclose(actual, wanted, atol=0.03)
    np.testing.assert_array_equal(actual > 0, np.asarray(wanted) > 0)


def test_top_k_and_top_p_keep_the_tokens_that_transformers_keeps():
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(size=(1, 40)).astype(np.float32) * 2
    for temperature, top_k, top_p in ((1.0, 5, 0.7), (1.7, 20, 0.9), (0.6, 40, 0.35)):
        warpers = [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
        kept = np.isfinite(LogitsProcessorList(warpers)(None, torch.from_numpy(logits))[0].numpy())
        actual = draws(logits[0], temperature=temperature, top_k=top_k, top_p=top_p, many=20000) > 0
        assert not actual[~kept].any() and actual.sum() >= 0.8 * kept.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(temperature=1.0), "key: found None, expected jax.random.key"),
        (dict(temperature=-1.0), "temperature: found -1.0, expected 0"),
        (dict(temperature=float("nan")), "temperature: found nan, expected 0"),
        (dict(max_new_tokens=0), "max_new_tokens: found 0, expected at least 1"),
        (dict(top_k=0), "top_k: found 0, expected at least 1"),
        (dict(top_p=0.0), "top_p: found 0.0, expected above 0"),
        (dict(top_p=1.5), "top_p: found 1.5, expected above 0 and at most 1"),
        (dict(input_ids=np.ones(3, int)), r"input_ids: found shape \(3,\), expected \[batch, seq\]"),
        (dict(input_ids=np.ones((2, 0), int)), r"found shape \(2, 0\), expected .* seq at least 1"),
        (dict(attention_mask=np.ones((3, 2))), r"attention_mask: found shape \(3, 2\), expected .* \(3, 9\)"),
        (
            dict(attention_mask=np.eye(3, LENGTH) * [[1], [0], [1]]),
            r"found no real token in rows \[1\]",
        ),
    ],
)
def test_meaningless_arguments_are_refused(change, message, pair):
    arguments = dict(input_ids=prompts(), max_new_tokens=2) | change
    with pytest.raises(ValueError, match=message):
        generate(pair("llama")[1], **arguments)
