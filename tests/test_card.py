"""The README.md beside an adapter: written by every save, never over somebody's own."""

import json
from pathlib import Path

import peft
import pytest
import transformers
import yaml

import moe_lora_interop
import moe_lora_interop.peft_tuner as tuner
from moe_lora_interop.checkpoint.card import PLACEHOLDER, model_card
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.in_words import routing_in_words
from moe_lora_interop.disk.files import TensorInfo
from tests.hf import make_model
from tools.samples import sample

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
    assert 'pip install "moe-lora-jax[torch]"' in card
    assert "6 tensors, 960 parameters, 3,840 bytes (F32)." in card
    assert "| `model.layers.*.self_attn.q_proj` | 2 | 3 | 32 | 32 | 2 |" in card
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


def head_of(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    ("base", "known"),
    [
        ("org/base-1.5B", True),
        ("gpt2", True),
        *((name, False) for name in ("/models/base", "./base", "a: b", "1" * 5000, None)),
    ],
)
@pytest.mark.parametrize("by_peft", [False, True])
def test_only_an_id_of_the_hub_stands_in_the_head(base, known, by_peft):
    of_peft = f"base_model: {base}\nlibrary_name: peft\ntags:\n- base_model:adapter:{base}\n- transformers"
    card = model_card(MoeLoraConfig(base_model_name_or_path=base), {}, of_peft if by_peft else None)
    head = head_of(card)
    assert head.get("base_model") == (base if known else None) and head["library_name"] == "peft"
    assert any("base_model:adapter" in tag for tag in head["tags"]) == (known and by_peft)
    assert f"Base model: `{base or 'unknown'}`." in card


def test_a_directory_is_no_id_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert "base_model" not in head_of(model_card(MoeLoraConfig(base_model_name_or_path="org/base"), {}))


@pytest.mark.parametrize("path", ["base", "peft", "tags", "a model's directory with a long name " * 3])
@pytest.mark.parametrize("known", [True, False])
def test_nothing_but_the_base_models_name_is_replaced_in_the_head(tmp_path, monkeypatch, path, known):
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).mkdir()
    (tmp_path / path / "config.json").write_text(json.dumps({"_name_or_path": "org/base" if known else "/data/base"}))
    wanted = {"base_model": path, "library_name": "peft", "tags": [f"base_model:adapter:{path}", "lora"]}
    config = MoeLoraConfig(base_model_name_or_path=path)
    found = head_of(model_card(config, {}, yaml.safe_dump(wanted)))
    named = {"base_model": "org/base", "library_name": "peft", "tags": ["base_model:adapter:org/base", "lora"]}
    assert found == (named if known else {"library_name": "peft", "tags": ["lora"]})
    own = head_of(model_card(config, {}))
    assert own.pop("base_model", None) == ("org/base" if known else None)
    assert own == {"library_name": "peft", "tags": ["moe-lora", "mixture-of-experts", "lora"]}


def test_modules_of_different_sizes_have_rows_of_their_own():
    """By hand: two kinds of layer, one of them with plain LoRA in the first layer and unequal ranks in the second."""
    config = MoeLoraConfig(
        r=2,
        num_experts=3,
        num_experts_pattern={r"layers\.0\.mlp\.up": 1},
        rank_pattern={r"layers\.1\.mlp\.up": [1, 4, 2]},
        target_modules=["up", "q"],
    )
    shapes = {
        "model.layers.0.mlp.up": ((1, 2, 8), (1, 16, 2)),
        "model.layers.1.mlp.up": ((3, 4, 8), (3, 16, 4)),
        "model.layers.0.attn.q": ((3, 2, 8), (3, 8, 2)),
        "model.layers.1.attn.q": ((3, 2, 8), (3, 8, 2)),
    }
    infos = {
        f"base_model.model.{module}.moe_lora_{name}": TensorInfo("BF16", shape)
        for module, of_module in shapes.items()
        for name, shape in zip("AB", of_module, strict=True)
    }
    card = model_card(config, infos)
    rows = [line for line in card.splitlines() if line.startswith("| `")]
    assert sorted(rows) == [
        "| `model.layers.*.attn.q` | 2 | 3 | 8 | 8 | 2 |",
        "| `model.layers.*.mlp.up` | 1 | 1 | 8 | 16 | 2 |",
        "| `model.layers.*.mlp.up` | 1 | 3 | 8 | 16 | [1, 4, 2] |",
    ]
    values = 16 + 32 + 96 + 192 + 2 * (48 + 48)
    assert f"8 tensors, {values} parameters, {2 * values:,} bytes (BF16)." in card


def saved(folder, **fields):
    moe_lora_interop.write(sample("native", **fields), folder)
    return (folder / "README.md").read_text()


def test_a_card_that_nobody_changed_follows_the_adapter(tmp_path):
    assert "16 tensors" in saved(tmp_path, layers=2)
    assert "8 tensors" in saved(tmp_path, layers=1)


@pytest.mark.parametrize(
    "change", [("## Load", "## How to load"), ("<!-- card", "<!-- my card"), ("-->\n", "-->\nMine")]
)
def test_a_card_that_somebody_changed_stays(tmp_path, change):
    changed = saved(tmp_path, layers=2).replace(*change)
    (tmp_path / "README.md").write_text(changed)
    assert saved(tmp_path, layers=1) == changed


def test_a_card_says_how_its_adapter_was_trained(tmp_path):
    assert "## Training" not in saved(tmp_path)
    settings = {"batch_size": 2, "gradient_accumulation": 4, "learning_rate": 2e-4}
    run = {"settings": settings, "data": "120 examples, crc32 01ab", "eval_data": "12 examples, crc32 02cd"}
    metrics = [
        {"step": 0, "eval_loss": 3.25},
        {"step": 10, "lm_loss": 3.0},
        {"step": 20, "lm_loss": 2.5},
        {"step": 20, "eval_loss": 2.75},
    ]
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "run.json").write_text(json.dumps(run))
    (tmp_path / "training" / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)) + '\n{"step": 21, "lm_')
    assert (
        "## Training\n\n20 steps of 8 rows by AdamW, learning rate 0.0002 at its peak, on 120 examples, crc32 01ab. "
        "Loss in training (nats per token): 3.000 at step 10, 2.500 at step 20. Loss on held-out data (nats per "
        "token): 3.250 at step 0, 2.750 at step 20 (12 examples, crc32 02cd).\n"
    ) in saved(tmp_path)


@pytest.mark.parametrize("golden", ["top_k", "ffn", "model_task_table"])
def test_a_card_says_of_vllm_what_inspect_says(golden):
    found = moe_lora_interop.inspect(Path(__file__).parent / "golden" / "native" / golden / "adapter")
    card, needs = model_card(found.config, found.tensors), found.vllm
    assert (f"--enable-lora --max-lora-rank {needs.max_lora_rank} --lora-modules" in card) == (golden == "top_k")
    assert all(f"\n- {problem}\n" in card for problem in needs.problems)
    assert ("vLLM cannot serve it" in card) == bool(needs.problems)


@pytest.mark.parametrize("run", ["{", "[]", '{"settings": {}}', '{"settings": {"batch_size": "all"}, "data": 1}'])
@pytest.mark.parametrize("metrics", ["[1]", '{"lm_loss": 2}', '{"step": 1, "lm_loss": 2}'])
def test_a_folder_of_another_program_stops_no_save(tmp_path, run, metrics):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "run.json").write_text(run)
    (tmp_path / "training" / "metrics.jsonl").write_text(metrics)
    assert "## Training" not in saved(tmp_path)


def test_the_blocks_name_the_base_and_the_place_on_the_hub():
    card = model_card(MoeLoraConfig(base_model_name_or_path="org/base"), {}, repo_id="user/mixture")
    for line in (
        'base_model = AutoModelForCausalLM.from_pretrained("org/base")',
        'model = PeftModel.from_pretrained(base_model, "user/mixture")',
        'model = mlj.load_base_model(snapshot_download("org/base"))',
        'mlj.load_adapter(model, snapshot_download("user/mixture"))',
    ):
        assert line in card
