"""The LoRA products on a CPU against a loop over tokens."""

import numpy as np
import pytest
import torch

from moe_lora_interop.vllm_plugin.cpu_ops import bgmv_expand, bgmv_expand_slice, bgmv_shrink

SLOTS, IN, RANK, OUT = 3, 7, 4, 6
BATCHES = [[0], [-1], [2, 2, 2], [-1, -1], [0, -1, 2, 1, -1, 0, 2], [2, -1]]


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def by_token(x, weights, slots, before, scale=1.0):
    """before + scale W x, token by token; `before` alone where there is no adapter."""
    rows = [
        np.float64(before[t]) + (scale * np.float64(weights[s]) @ np.float64(x[t]) if s >= 0 else 0)
        for t, s in enumerate(slots)
    ]
    return np.stack(rows)


@pytest.mark.parametrize("slots", BATCHES, ids=str)
@pytest.mark.parametrize("axis", [True, False], ids=["vllm's axis of 1", "without it"])
def test_shrink_and_expand(slots, axis):
    x, a, b = drawn(len(slots), IN), drawn(SLOTS, RANK, IN), drawn(SLOTS, OUT, RANK)
    indices = torch.tensor(slots)
    weights = (a[:, None], b[:, None]) if axis else (a, b)
    codes = torch.zeros(len(slots), RANK)
    bgmv_shrink(x, weights[0], codes, indices, 0.5)
    np.testing.assert_allclose(codes, by_token(x, a, slots, torch.zeros(len(slots), RANK), 0.5), atol=1e-6)
    y = drawn(len(slots), OUT)
    expected = by_token(codes, b, slots, y)
    bgmv_expand(codes, weights[1], y, indices)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    base = [t for t, s in enumerate(slots) if s < 0]
    assert torch.equal(y[base], drawn(len(slots), OUT)[base])


@pytest.mark.parametrize("slots", BATCHES, ids=str)
def test_expand_into_a_part_and_without_adding(slots):
    x, b, indices = drawn(len(slots), RANK), drawn(SLOTS, 3, RANK), torch.tensor(slots)
    y = drawn(len(slots), OUT)
    expected = y.clone()
    expected[:, 2:5] = torch.tensor(by_token(x, b, slots, y[:, 2:5]))
    bgmv_expand_slice(x, b, y, indices, 2, 3)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)
    bgmv_expand(x, b, y, indices, add_inputs=False)
    np.testing.assert_allclose(y[:, :3], by_token(x, b, slots, torch.zeros(len(slots), 3)), atol=1e-6)


def test_half_precision_is_summed_in_float32():
    """The logits of a router must not be rounded to bfloat16."""
    x, a = drawn(5, 64).bfloat16(), drawn(1, RANK, 64).bfloat16()
    codes = torch.zeros(5, RANK)
    bgmv_shrink(x, a, codes, torch.zeros(5, dtype=torch.long))
    np.testing.assert_allclose(codes, x.double() @ a[0].double().T, atol=1e-5)


def test_one_slot_for_each_token():
    with pytest.raises(ValueError, match="slots: found 2, expected one for each of 3 tokens"):
        bgmv_shrink(drawn(3, IN), drawn(1, RANK, IN), torch.zeros(3, RANK), torch.tensor([0, 0]))
