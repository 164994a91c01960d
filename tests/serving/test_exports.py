"""The exports in vLLM as it comes, without the plugin: tokens and log-probabilities of the PEFT tuner.

Adapters and the base are asked one after the other here: without the plugin, vLLM 0.32 gives a base request that is
batched with a LoRA that LoRA's delta on CPUs (vllm#48421).
"""

import pytest
import torch

import moe_lora_interop
from moe_lora_interop.export import export_lora, export_lora_experts, export_mixtral, uniform_gates
from tests.serving.made import peft_answers, write_base, write_lora, write_mixture
from tests.serving.server import BASE, STOCK, assert_same, lora_modules, serving, skip_without_vllm

skip_without_vllm()
PROMPTS = [[5, 9, 33, 20], [7, 80, 12, 4, 15, 60, 61]]
LENGTH = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory with the base, {name: mixture} and {name: what vLLM gets}: each pair computes the same."""
    path = tmp_path_factory.mktemp("exports")
    base = write_base(path / "base", "llama")
    sizes = dict(r=4, num_experts=4, lora_alpha=16)
    mixtures = {
        "uniform": write_mixture(path / "uniform", base, seed=1, alter=_no_router, **sizes),
        "expert": write_mixture(path / "expert", base, seed=2, alter=_expert_2, router_bias=True, **sizes),
        "plain": write_lora(path / "plain", base, seed=3, lora_alpha=16),
    }
    uniform, expert = (moe_lora_interop.read(mixtures[name]) for name in ("uniform", "expert"))
    export_lora(uniform, path / "lora", uniform_gates(uniform), "uniform")
    export_lora_experts(expert, path / "experts")
    return base, mixtures, {**mixtures, "uniform": path / "lora", "expert": path / "experts" / "expert_2"}


def _no_router(parameters):
    """Every gate is 1/E."""
    for name, parameter in parameters.items():
        if "router" in name:
            torch.nn.init.zeros_(parameter)


def _expert_2(parameters):
    """The gate of expert 2 is 1, to 1e-21."""
    _no_router(parameters)
    for name, parameter in parameters.items():
        if "router" in name and parameter.ndim == 1:
            parameter[2] = 50.0


def test_loras_equal_the_tuner(made, tmp_path, measured):
    base, mixtures, served = made
    arguments = ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "4", *lora_modules(served)]
    with serving(base, tmp_path / "log", *arguments, **STOCK) as server:
        answers = {name: [server.ask(name, prompt, LENGTH) for prompt in PROMPTS] for name in served}
        answers[BASE] = [server.ask(BASE, prompt, LENGTH) for prompt in PROMPTS]
    for name, found in answers.items():
        assert_same(found, peft_answers(base, mixtures.get(name), PROMPTS, LENGTH), measured, "LoRA exports")
    assert len({tuple(a[0].tokens) for a in answers.values()}) == len(answers), "no two say the same"


def test_a_mixtral_equals_the_tuner(tmp_path, measured):
    base = write_base(tmp_path / "base", "llama")
    fields = dict(scope="ffn", r=4, num_experts=4, top_k=2, lora_alpha=16, num_experts_pattern={r"self_attn\..*": 1})
    mixture = write_mixture(tmp_path / "ffn", base, seed=4, **fields)
    export_mixtral(moe_lora_interop.read(mixture), base, tmp_path / "mixtral")
    with serving(tmp_path / "mixtral", tmp_path / "log", **STOCK) as server:
        found = [server.ask(BASE, prompt, LENGTH) for prompt in PROMPTS]
    assert_same(found, peft_answers(base, mixture, PROMPTS, LENGTH), measured, "Mixtral export")
    assert found != peft_answers(base, None, PROMPTS, LENGTH)
