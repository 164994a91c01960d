"""What vLLM can serve, by which road otherwise, and the rank that it must be started with."""

import pytest

from moe_lora_interop.checkpoint.servable import lora_rank, problems, rows
from moe_lora_interop.config import MoeLoraConfig
from moe_lora_interop.errors import ConfigError

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("fields", "modules", "named"),
    [
        ({"scope": "ffn"}, [DOWN], ["scope: found ffn", "--as mixtral"]),
        ({"router_input": "task", "num_tasks": 3, "router_depth": 0}, [Q], ["router_input: found task", "--task ID"]),
        ({"scope": "model"}, [Q], ["scope: found model", "--gates FILE.json"]),
        ({"router_input": "expert_activations"}, [Q], ["router_input: found expert_activations", "moe-lora run --"]),
        ({"mix": "weights"}, [Q], ["mix: found weights, expected outputs", "--gates FILE.json"]),
        ({"temperature_hidden_size": 4}, [Q], ["temperature_hidden_size: found 4", "moe-lora run --"]),
        ({"num_experts": 33}, [Q], [f"{Q}: num_experts: found 33, expected at most 32"]),
        (
            {"num_experts": 32, "r": 1, "threshold": 0.1, "adaptive_threshold": True},
            [Q],
            ["num_experts: found 32, expected at most 31"],
        ),
        ({"r": 128}, [Q], ["rank: found 524 rows of all experts and routers, expected at most 512"]),
        ({}, ["lm_head"], ["lm_head: found an adapter on a head"]),
        ({}, ["model.embed_tokens"], ["model.embed_tokens: found an adapter on a head or on embeddings"]),
        ({"modules_to_save": ["lm_head"]}, [Q], ["modules_to_save: found ['lm_head'], expected null"]),
        ({}, ["model.layers.0.mlp.experts.3.up_proj"], ["on the base's own experts, which vLLM fuses"]),
        ({"rank_pattern": {"q_proj": [1, 2]}}, [Q], ["q_proj: r: "]),
    ],
)
def test_a_refusal_names_the_field_and_the_road(fields, modules, named):
    found = problems(MoeLoraConfig(**fields), modules)
    assert len(found) == 1
    assert [words for words in named if words not in found[0]] == []


def test_all_reasons_are_given_at_once():
    config = MoeLoraConfig(scope="ffn", modules_to_save=["norm"], temperature_hidden_size=4)
    assert [p.partition(":")[0] for p in problems(config, [DOWN, "lm_head"])] == [
        "modules_to_save",
        "lm_head",
        "scope",
        "temperature_hidden_size",
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 2, "norm_topk_prob": False, "router_bias": True, "routed_scaling_factor": 2.0},
        {"threshold": 0.2, "adaptive_threshold": True},
        {"top_k": 1, "top_p": 0.7, "entropy_threshold": 0.9},
        {"scoring_func": "sparsemax"},
        {"shared_lora_A": True},
        {"num_experts": 1, "scope": "ffn"},  # without a router there is no scope
    ],
)
def test_scope_linear_is_served(fields):
    assert problems(MoeLoraConfig(**fields), [Q, DOWN]) == []


@pytest.mark.parametrize(
    ("fields", "in_float32", "in_bfloat16"),
    [
        ({"num_experts": 4, "r": 4}, 4 * 4 + 4, 4 * 4 + 3 * 4),
        ({"num_experts": 3, "r": [1, 2, 5]}, 8 + 3, 8 + 9),
        ({"num_experts": 3, "r": 2, "shared_lora_A": True}, 6 + 3, 6 + 9),
        ({"num_experts": 4, "r": 4, "threshold": 0.1, "adaptive_threshold": True}, 16 + 5, 16 + 15),
        ({"num_experts": 1, "r": 7}, 7, 7),
        ({"num_experts": 2, "r": 2, "num_experts_pattern": {"down_proj": 8}}, 16 + 8, 16 + 24),
    ],
)
def test_the_rank_counts_experts_and_router_rows(fields, in_float32, in_bfloat16):
    config = MoeLoraConfig(**fields)
    assert (rows(config, [Q, DOWN], 1), rows(config, [Q, DOWN])) == (in_float32, in_bfloat16)
    least = [min(rank for rank in (8, 16, 32, 64, 128) if rank >= n) for n in (in_float32, in_bfloat16)]
    assert [lora_rank(config, [Q, DOWN], 1), lora_rank(config, [Q, DOWN])] == least


def test_a_rank_beyond_vllms_largest_is_refused():
    with pytest.raises(ConfigError, match="rank: found 524 rows, expected at most 512"):
        lora_rank(MoeLoraConfig(r=128), [Q])
