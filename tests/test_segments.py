"""Several sequences in one row: each gets what it would get in a row of its own, in every family."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_training import arrays, compiled_once  # noqa: F401

import moe_lora_jax as mlj
from moe_lora_jax.adapters.filters import PARTS
from moe_lora_jax.models.attending import chunked
from moe_lora_jax.models.masks import segment_positions
from moe_lora_jax.train.batches import collate, collate_packed
from moe_lora_jax.train.examples import Example
from moe_lora_jax.train.losses import next_token_loss
from moe_lora_jax.train.step import Batch, make_train_step, merge_back, split_model
from tests.hf import CASES, VOCAB, Saved

pytestmark = pytest.mark.usefixtures("compiled_once")
LENGTHS = (9, 13, 1, 5)
MIXTURE = {"r": 2, "num_experts": 3, "top_k": 2, "init_lora_weights": False}
MIXTURE |= {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1}
WINDOWS = ("mistral", "gemma3")
SCOPES = {
    "linear": {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]},
    "ffn": {"scope": "ffn", "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "model": {"scope": "model", "target_modules": ["q_proj", "v_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory)


def packed():
    """ids of the sequences, the row that holds all, and its segments; two columns of padding."""
    rng = np.random.default_rng(0)
    parts = [rng.integers(3, VOCAB, n) for n in LENGTHS]
    row = np.concatenate([*parts, [0, 0]])[None]
    return parts, row, np.repeat([*range(1, len(parts) + 1), 0], [*LENGTHS, 2])[None]


@pytest.mark.parametrize("attention", ["plain", "chunked"])
@pytest.mark.parametrize("case", CASES)
def test_a_row_of_several_equals_rows_of_one(saved, case, attention, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 8)
    parts, row, segments = packed()
    model = mlj.load_base_model(saved(case)[1], attention=attention)
    logits = np.asarray(model(row, segment_ids=segments))[0]
    scale = np.abs(logits).max()
    begin = 0
    for ids in parts:
        alone = np.asarray(model(ids[None]))[0]
        here = logits[begin : begin + len(ids)]
        np.testing.assert_allclose(here / scale, alone / scale, atol=1e-5)
        counted = np.ones((1, len(ids)), bool)
        apart, together = (float(next_token_loss(x[None], ids[None], counted).mean) for x in (alone, here))
        assert together == pytest.approx(apart, rel=1e-6)
        begin += len(ids)
    joined = np.asarray(model(row))[0, : begin - 5]
    assert np.abs(joined - logits[: begin - 5]).max() > 1e-2  # without segments they are read as one text


def made(lengths=(9, 13, 1, 5), seed=0) -> list[Example]:
    """The first third of each has no loss; the last has loss on its first token, too."""
    rng = np.random.default_rng(seed)
    found = [Example(rng.integers(3, VOCAB, n).astype(np.int32), np.arange(n) >= n // 3, n) for n in lengths]
    return [*found[:-1], Example(found[-1].ids, np.ones(lengths[-1], bool), 1)]


def step_of(model, rows: Batch) -> tuple:
    """The metrics of one step, and the gradient: SGD at a learning rate of 1."""
    before = arrays(model, PARTS["all"])
    optimizer = optax.sgd(1.0)
    model.train()
    graphdef, state, frozen = split_model(model, PARTS["all"], optimizer)
    state, metrics = make_train_step(graphdef, optimizer, model.moe_lora_config)(state, frozen, rows)
    merge_back(model, state, frozen)
    return jax.device_get(metrics), {path: before[path] - value for path, value in arrays(model, PARTS["all"]).items()}


def same_step(adapted, together: Batch, apart: Batch, name: str, measured) -> None:
    """Loss, both terms of the routers, their health, tokens and gradients of a packed batch and one that is not."""
    (found, gradient), (expected, reference) = (step_of(adapted(), rows) for rows in (together, apart))
    assert (found.tokens, found.counted_tokens) == (expected.tokens, expected.counted_tokens)
    for field in ("loss", "lm_loss", "load_balancing_loss", "router_z_loss"):
        assert getattr(expected, field) > 0
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=1e-6), field
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for path, sums in expected.router.items():
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found.router[path], sums)
    scale = max(np.abs(value).max() for value in reference.values())
    off = max(np.abs(gradient[path] - value).max() for path, value in reference.items()) / scale
    measured(f"gradient of a packed row, {name}", off)
    # sums in another order: of gemma3's examples apart, reversed and with more padding, they differ by 3.6e-5
    assert scale > 1e-3 and off < 4e-5
    assert gradient.keys() == reference.keys() and all(np.abs(value).max() > 0 for value in reference.values())


def micro(rows: Batch) -> Batch:
    return jax.tree.map(lambda x: x[None], rows)


def adapter_on(directory, scope: str, **options):
    def adapted():
        model = mlj.load_base_model(directory, **options)
        return mlj.apply_moe_lora(model, mlj.MoeLoraConfig(**MIXTURE, **SCOPES[scope]), rngs=nnx.Rngs(0))

    return adapted


@pytest.mark.parametrize(
    ("case", "scope"), [*((case, "linear") for case in CASES), *((c, s) for c in WINDOWS for s in ("ffn", "model"))]
)
def test_a_step_on_a_packed_row_is_that_of_its_examples_apart(saved, measured, case, scope):
    together = collate_packed([made()], 1, (30,), 0).batch
    apart = collate(made(), len(LENGTHS), (13,), 0).batch
    adapted = adapter_on(saved(case)[1], scope)
    same_step(adapted, micro(together), micro(apart), f"{case}, {scope}", measured)


def test_so_it_is_with_scanned_layers_remat_and_micro_batches(saved, measured):
    parts = [made(seed=n) for n in range(4)]
    together = collate_packed(parts, 4, (30,), 0).batch
    apart = collate([e for part in parts for e in part], 16, (13,), 0).batch
    both = (jax.tree.map(lambda x: x.reshape(2, x.shape[0] // 2, -1), rows) for rows in (together, apart))
    adapted = adapter_on(saved("llama")[1], "linear", scan_layers=True)
    same_step(adapted, *both, "scan, remat, accumulation", measured)


def test_positions_begin_with_every_segment():
    segments = np.array([[0, 0, 4, 4, 4, 2, 7, 7], [1, 1, 1, 1, 0, 0, 0, 0]])
    expected = [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1, 2, 3]]
    np.testing.assert_array_equal(segment_positions(segments), expected)


def test_a_number_that_comes_again_is_another_segment(saved):
    _, row, segments = packed()
    again = np.where(segments == 3, 1, segments)  # 1, 2, 1, 4
    assert (again != segments).any()
    model = mlj.load_base_model(saved("llama")[1])
    np.testing.assert_array_equal(model(row, segment_ids=again), model(row, segment_ids=segments))


def test_segments_beside_what_they_replace_are_refused(saved):
    _, row, segments = packed()
    model = mlj.load_base_model(saved("llama")[1])
    with pytest.raises(ValueError, match="segment_ids and attention_mask: found both; segment_ids and cache: found bo"):
        model(row, np.ones_like(row), segment_ids=segments, cache=model.empty_cache(1, 40))
    with pytest.raises(
        ValueError, match="segment_ids: found shape \\(1, 3\\), expected that of input_ids, \\(1, 30\\)"
    ):
        model(row, segment_ids=segments[:, :3])
