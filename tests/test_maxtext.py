"""MaxText's scanned LoRA tree against its own formula, written out: W[:, l] += einsum over the rank."""

import numpy as np
import pytest

from moe_lora_interop.dialects import MAXTEXT, NATIVE
from moe_lora_interop.rules.tensors import decode, encode
from tests.adapters import assert_same_tensors

EMBED, LAYERS, HEADS, GROUPS, SIZE, RANK = 6, 3, 4, 2, 5, 2
NAMES = {"query": ("q_proj", HEADS), "key": ("k_proj", GROUPS), "value": ("v_proj", GROUPS), "out": ("o_proj", HEADS)}


def tree(dtype="float32"):
    """The shapes of get_lora_abstract_state for scanned layers (param_scan_axis 1), spelled out."""
    rng, found = np.random.default_rng(0), {}
    for name, (_, heads) in NAMES.items():
        if name == "out":
            shapes = (heads, LAYERS, SIZE, RANK), (RANK, LAYERS, EMBED)
        else:
            shapes = (EMBED, LAYERS, RANK), (RANK, LAYERS, heads, SIZE)
        for part, shape in zip("ab", shapes, strict=True):
            found[f"decoder.layers.self_attention.{name}.lora_{part}.kernel"] = rng.normal(size=shape).astype(dtype)
    return found


def sizes(module):
    heads = dict(NAMES.values())[module.rpartition(".")[2]]
    return {"expert": 1, "rank": (RANK,), "head": heads}


def no_heads(module):
    return {name: size for name, size in sizes(module).items() if name != "head"}


def test_the_delta_of_every_layer_is_that_of_maxtext():
    stored = tree("float64")
    tensors, problems = decode(MAXTEXT.rules, stored, no_heads)
    assert problems == [] and len(tensors) == 2 * len(NAMES) * LAYERS
    for name, (ours, _) in NAMES.items():
        a, b = (stored[f"decoder.layers.self_attention.{name}.lora_{part}.kernel"] for part in "ab")
        for layer in range(LAYERS):
            module = f"model.layers.{layer}.self_attn.{ours}"
            (expert_a,), (expert_b,) = tensors[module, "lora_A"], tensors[module, "lora_B"]
            if name == "out":
                delta = np.einsum("ndr,re->nde", a[:, layer], b[:, layer]).reshape(-1, EMBED)
            else:
                delta = np.einsum("br,rnd->bnd", a[:, layer], b[:, layer]).reshape(EMBED, -1)
            np.testing.assert_allclose((expert_b @ expert_a).T, delta, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_to_the_native_names_and_back_bit_by_bit(dtype):
    stored = tree(dtype)
    tensors, _ = decode(MAXTEXT.rules, stored, sizes)
    native, problems = encode(NATIVE.rules, tensors, sizes)
    assert problems == []
    assert native["base_model.model.model.layers.2.self_attn.k_proj.moe_lora_B"].shape == (1, GROUPS * SIZE, RANK)
    again, problems = decode(NATIVE.rules, native, sizes)
    assert problems == []
    back, problems = encode(MAXTEXT.rules, again, sizes)
    assert problems == []
    assert_same_tensors(back, stored)


def test_what_does_not_fit_is_named():
    tensors, _ = decode(MAXTEXT.rules, tree(), sizes)
    two = {slot: np.concatenate([t, t]) if slot[1] == "lora_A" else t for slot, t in tensors.items()}
    _, problems = encode(MAXTEXT.rules, two, sizes)
    assert len(problems) == len(NAMES) and all("axis 'expert' has size 2" in p for p in problems)
    _, problems = encode(MAXTEXT.rules, tensors, no_heads)
    assert any("(head dim)" in p for p in problems)
    partial = {slot: t for slot, t in tensors.items() if ".layers.1." not in slot[0]}
    _, problems = encode(MAXTEXT.rules, partial, sizes)
    assert any("model.layers.1.self_attn.q_proj" in p and "missing" in p for p in problems)
    _, problems = encode(MAXTEXT.rules, {("model.layers.0.mlp.up_proj", "lora_A"): np.ones((1, 2, 3))}, sizes)
    assert problems == ["model.layers.0.mlp.up_proj lora_A: this layout has no place for it"]
