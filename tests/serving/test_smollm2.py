"""SmolLM2-135M with a mixture that `moe-lora train` made, in one batch with others in vLLM, against PEFT."""

import json

import pytest

from moe_lora_interop.cli.main import main as moe_lora
from moe_lora_jax.demo.topics import questions
from tests.serving.made import peft_answers, write_lora, write_mixture
from tests.serving.server import BASE, ROOT, assert_same, lora_modules, serving, skip_without_vllm

skip_without_vllm()
SMOLLM2 = ROOT / "build" / "smollm2"
LENGTH = 24
PROMPTS = [
    "Question: what is forty three minus twenty two?\nAnswer:",
    "Question: how do I cook a leek salad with garlic?\nAnswer:",
]
if not (SMOLLM2 / "config.json").exists():
    pytest.skip(f"{SMOLLM2} is not there (make build/smollm2/config.json)", allow_module_level=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{name: directory}: trained in JAX for a few steps; a random mixture and a random LoRA beside it."""
    path = tmp_path_factory.mktemp("smollm2")
    lines = [json.dumps({"prompt": q.prompt, "completion": q.completion}) for q in questions(8, 0)]
    (path / "data.jsonl").write_text("\n".join(lines) + "\n")
    run = ["train", "--model", SMOLLM2, "--data", path / "data.jsonl", "--output-dir", path / "trained", "--quiet"]
    sizes = ["--num-experts", 4, "--top-k", 2, "--r", 4, "--steps", 6, "--batch-size", 4, "--learning-rate", 3e-3]
    assert not moe_lora([*map(str, run), *map(str, sizes)])
    return {
        "trained": path / "trained",
        "random": write_mixture(path / "random", SMOLLM2, seed=1, r=2, lora_alpha=1, num_experts=8, std=0.05),
        "lora": write_lora(path / "lora", SMOLLM2, seed=2, r=16, lora_alpha=1),
    }


def test_a_trained_mixture_answers_as_in_peft(trained, tmp_path, measured):
    arguments = ["--enable-lora", "--max-lora-rank", "64", "--max-loras", "3", *lora_modules(trained)]
    with serving(SMOLLM2, tmp_path / "log", *arguments) as server:
        ids = [server.tokenize(prompt) for prompt in PROMPTS]
        asked = [(name, prompt) for name in (*trained, BASE) for prompt in ids]
        answers, _ = server.ask_at_once(asked, LENGTH)
    expected = [a for name in (*trained, BASE) for a in peft_answers(SMOLLM2, trained.get(name), ids, LENGTH)]
    assert_same(answers, expected, measured, "SmolLM2")
    to_the_first = answers[:: len(ids)]
    assert len({tuple(answer.tokens) for answer in to_the_first}) == len(to_the_first), "no two say the same"
