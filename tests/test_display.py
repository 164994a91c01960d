"""What a single layer shows: its facts, counted here once more by hand, and its variables but not its machinery."""

import html

import pytest
import treescope
from flax import nnx
from tiny_training import tiny_base

import moe_lora_jax as mlj

# hidden size 32, feed-forward 48; 3 experts of rank 2
A, B, ROUTER = 3 * 2 * 32, 3 * 2 * 32, 3 * 32
LINEAR = {
    "top_k": (
        {"top_k": 2},
        "3 experts of rank 2, scaling 2",
        A + B + ROUTER,
        "p = softmax(z), keep the 2 largest, divided by their sum",
    ),
    "shared A": (
        {"shared_lora_A": True},
        "3 experts of rank 2, one shared A, scaling 2",
        A // 3 + B + ROUTER,
        "keep all",
    ),
    "ranks": ({"r": [2, 1, 2]}, "3 experts of rank [2, 1, 2], scaling [2, 4, 2]", A + B + ROUTER, "keep all"),
    "threshold": (
        {"threshold": 0.5, "adaptive_threshold": True, "scoring_func": "sigmoid", "norm_topk_prob": False},
        "3 experts of rank 2, scaling 2",
        A + B + ROUTER + 32 + 1,
        "p = sigmoid(z), keep those with p >= tau = 0.5 * sigmoid(w.x + c), tau subtracted, not renormalised",
    ),
    "plain": ({"num_experts": 1}, "one expert of rank 2 (plain LoRA), scaling 2", (A + B) // 3, None),
    "model": ({"scope": "model"}, "scaling 2; gates from the model's router", A + B, None),
}  # fmt: skip


def applied(**fields):
    sizes = {"r": 2, "lora_alpha": 4, "num_experts": 3, "target_modules": ["q_proj"]}
    return mlj.apply_moe_lora(tiny_base(), mlj.MoeLoraConfig(**{**sizes, **fields}), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_layer(name):
    fields, experts, parameters, router = LINEAR[name]
    layer = applied(**fields).model.layers[0].self_attn.q_proj
    shown = repr(layer)
    first = shown.splitlines()[0]
    assert first.startswith("MoeLoraLinear(") and "32 -> 32; " in first and experts in first
    assert first.endswith(f"{parameters:,} adapter parameters")
    assert "lora_a=MoeLoraParam" in shown and "base_layer=Linear" in shown
    assert ("router=Router( # 32 -> 3 experts; " in shown) == (router is not None)
    assert router is None or router in shown
    page = html.unescape(treescope.render_to_html(layer, compressed=False))
    assert first.partition("# ")[2] in page and (router is None or router in page)
    for machinery in ("Dropout", "RngStream", "scalings=", "deterministic=", "Shared("):
        assert machinery not in shown and machinery not in page
    assert ("threshold_bias" in shown) == (name == "threshold"), "one zero is shown, too"


@pytest.mark.parametrize("show", [repr, treescope.render_to_text])
def test_a_block(show):
    block = applied(scope="ffn", target_modules=["up_proj", "down_proj"], top_k=2).model.layers[0].mlp
    shown = show(block)
    inside = 2 * 3 * 2 * (32 + 48)
    first = shown.splitlines()[0]
    assert "3 experts, each a whole feed-forward block" in first and f"; {inside + ROUTER:,} adapter" in first
    assert "up_proj=SlotLinear( # 32 -> 48; 3 experts of rank 2, scaling 2; 480 adapter parameters" in shown
    assert "48 -> 32; 3 experts of rank 2, scaling 2, adds up the gated experts" in shown


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scope": "model"}, "the last hidden state -> 3 experts of every layer; p = softmax(z), keep all"),
        (
            {"scope": "model", "router_input": "task", "num_tasks": 5, "task_embedding_dim": 4},
            "the task ids -> 3 experts",
        ),
        (
            {"router_input": "task", "num_tasks": 5, "router_depth": 0},
            "hands the task ids to the routers of the layers",
        ),
    ],
)
def test_routers_elsewhere(fields, words):
    model = applied(**fields)
    assert words in repr(model.moe_lora_router).splitlines()[0]
    if fields.get("scope") is None:
        assert "router=TaskRouter( # 5 tasks -> 3 experts; p = softmax(z)" in repr(
            model.model.layers[0].self_attn.q_proj
        )


def test_a_whole_model_shows_its_layers():
    shown = repr(applied())
    assert shown.count("3 experts of rank 2, scaling 2; 480 adapter parameters") == 1 and "CausalLM" in shown
