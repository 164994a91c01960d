"""Every later family of base models: transformers' logits, and all ways of ours to compute them."""

import functools

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from moe_lora_jax.models import load_base_model
from moe_lora_jax.models.attending import chunked
from tests.hf import LATER, VOCAB, Saved

LENGTH = 24
MIXTURE = {"r": 2, "num_experts": 3, "top_k": 2, "init_lora_weights": False, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory)


def padded():
    """ids, a mask with padding on either side, and the positions that transformers is told."""
    ids = np.random.default_rng(0).integers(3, VOCAB, (3, LENGTH))
    mask = np.ones_like(ids)
    mask[1, -7:], mask[2, :7] = 0, 0
    return ids, mask, np.maximum(mask.cumsum(1) - 1, 0)


def by_transformers(model, ids, mask, positions):
    with torch.no_grad():
        ids, mask, positions = (torch.from_numpy(a) for a in (ids, mask, positions))
        return model(ids, attention_mask=mask, position_ids=positions).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def _compiled(graphdef, state, ids, options):
    return nnx.merge(graphdef, state)(ids, **options)


def logits(model, ids, **options):
    return _compiled(*nnx.split(model), ids, options)


def off(found, wanted, real):
    """The largest difference, by the largest logit."""
    scale = np.abs(wanted[real]).max()
    assert scale > 0.1 and np.isfinite(np.asarray(found)).all()
    return np.abs(np.asarray(found) - wanted)[real].max() / scale


@pytest.mark.parametrize("case", LATER)
def test_logits_equal_transformers_in_every_way_of_computing_them(case, saved, measured, monkeypatch):
    reference, directory = saved(case)
    ids, mask, positions = padded()
    real = mask.astype(bool)
    wanted = by_transformers(reference, ids, mask, positions)
    plain = load_base_model(directory)
    ours = {".".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(nnx.state(plain))}
    assert ours == {name.rpartition(".")[0] for name, _ in reference.named_parameters()}
    difference = off(logits(plain, ids, attention_mask=mask), wanted, real)
    measured(f"logits of {case}", difference)
    assert difference < 2e-5

    monkeypatch.setattr(chunked, "BLOCK", 8)
    scanned = load_base_model(directory, scan_layers=True, attention="chunked")  # and with remat
    assert off(logits(scanned, ids, attention_mask=mask), wanted, real) < 2e-5

    cache, pieces = plain.empty_cache(3, LENGTH), []
    for start in range(0, LENGTH, 8):
        part = slice(start, start + 8)
        piece, cache = logits(plain, ids[:, part], attention_mask=mask[:, part], cache=cache)
        pieces.append(piece)
    assert off(np.concatenate(pieces, axis=1), wanted, real) < 2e-5

    rows = [ids[0, :9], ids[1, :13]]  # in one row of two, a column of padding behind them
    row, segments = np.concatenate([*rows, [0, 0]])[None], np.repeat([[5, 2, 0]], [9, 13, 2], axis=1)
    packed = np.asarray(logits(plain, row, segment_ids=segments))[0]
    for found, alone in zip(np.split(packed[:22], [9]), (wanted[0, :9], wanted[1, :13]), strict=True):
        assert off(found, alone, slice(None)) < 2e-5
