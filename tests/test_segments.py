"""Several sequences in one row: each gets what it would get in a row of its own, in every family."""

import numpy as np
import pytest

import moe_lora_jax as mlj
from moe_lora_jax.models.attending import chunked
from moe_lora_jax.models.masks import segment_positions
from tests.hf import CASES, VOCAB, Saved

LENGTHS = (9, 13, 1, 5)


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
        np.testing.assert_allclose(logits[begin : begin + len(ids)] / scale, alone / scale, atol=1e-5)
        begin += len(ids)
    joined = np.asarray(model(row))[0, : begin - 5]
    assert np.abs(joined - logits[: begin - 5]).max() > 1e-2  # without segments they are read as one text


def test_positions_begin_with_every_segment():
    segments = np.array([[0, 0, 4, 4, 4, 2, 7, 7], [1, 1, 1, 1, 0, 0, 0, 0]])
    expected = [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1, 2, 3]]
    np.testing.assert_array_equal(segment_positions(segments), expected)


def test_segments_beside_what_they_replace_are_refused(saved):
    _, row, segments = packed()
    model = mlj.load_base_model(saved("llama")[1])
    with pytest.raises(ValueError, match="segment_ids and attention_mask: found both; segment_ids and cache: found bo"):
        model(row, np.ones_like(row), segment_ids=segments, cache=model.empty_cache(1, 40))
    with pytest.raises(
        ValueError, match="segment_ids: found shape \\(1, 3\\), expected that of input_ids, \\(1, 30\\)"
    ):
        model(row, segment_ids=segments[:, :3])
