"""The README.md beside an adapter: written by every save, never over somebody's own."""

import peft
import pytest
import transformers

import moe_lora_interop.peft_tuner as tuner
from moe_lora_interop.checkpoint.card import PLACEHOLDER
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.in_words import routing_in_words
from tests.hf import make_model

IMPORT = "import moe_lora_interop.peft_tuner"


@pytest.fixture
def model():
    config = tuner.MoeLoraConfig(r=2, num_experts=3, top_k=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(make_model("llama"), config)


def test_a_save_by_peft_has_the_import_line_the_rule_and_the_tensors(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert IMPORT in card and PLACEHOLDER not in card
    assert "keep the 2 largest" in card
    assert "| `base_model.model.model.layers.0.self_attn.q_proj.moe_lora_A` | F32 | [3, 2, 32] |" in card
    assert f"transformers {transformers.__version__}" in card and f"peft {peft.__version__}" in card


def test_a_second_save_keeps_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count(IMPORT) == 1


def test_a_users_own_card_stays(model, tmp_path):
    (tmp_path / "README.md").write_text("# My adapter\n\nTrained on my cat.\n")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Trained on my cat." in card and IMPORT not in card


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({}, "z = R x, p = softmax(z), keep all, divided by their sum"),
        ({"num_experts": 1}, "none, one expert (plain LoRA)"),
        (
            {"top_k": 2, "norm_topk_prob": False, "router_bias": True, "router_temperature": 0.5},
            "z = (R x + b) / 0.5, p = softmax(z), keep the 2 largest, not renormalised",
        ),
        (
            {"threshold": 0.3, "scoring_func": "sigmoid"},
            "z = R x, p = sigmoid(z), keep those with p >= 0.3, divided by their sum",
        ),
    ],
)
def test_the_rule_in_words(fields, rule):
    assert routing_in_words(MoeLoraConfig(**fields)) == rule
