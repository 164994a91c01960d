"""Engines of other kinds: few slots, another model, half precision, two processes, and those that cannot serve.

Each ends before the next one starts, so none of them can share a process's groups with `test_engine`'s.
"""

import itertools
import os
import types

import pytest
import torch

import moe_lora_interop
from tests.serving.engine import BASE, ENVIRONMENT, LENGTH, MIXTURES, PROMPTS, TOLERANCE, Made, engine, everyone
from tests.serving.server import skip_without_vllm

skip_without_vllm()
os.environ |= ENVIRONMENT
pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own are no errors of ours


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("llama"), "llama", list(MIXTURES))


def test_slots_are_evicted_and_filled_again(llama):
    """More adapters than slots, on the device and in memory: every answer stays its adapter's."""
    with engine(llama.base, llama.adapters, max_loras=2, max_cpu_loras=3) as small:
        for names in itertools.islice(itertools.permutations(llama.adapters, 4), 0, None, 311):
            asked = everyone(names, PROMPTS)
            assert llama.worst(asked, small.ask(asked, LENGTH)) < TOLERANCE


def test_a_qwen3(tmp_path, measured):
    made = Made(tmp_path, "qwen3", ["top2", "unequal", "adaptive"])
    with engine(made.base, made.adapters) as running:
        asked = everyone(made.adapters, PROMPTS)
        worst = made.worst(asked, running.ask(asked, LENGTH))
    measured("log-probabilities in vLLM against PEFT: Qwen3, 3 mixtures, a LoRA and the base", worst)
    assert worst < TOLERANCE


def test_half_precision_gates_by_unrounded_logits(llama, monkeypatch, measured):
    """The router of the first layer's q_proj, from vLLM's own product of bfloat16, against float64."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    seen = []
    original = PunicaWrapperCPU.add_shrink

    def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs):
        original(self, y, x, lora_a_stacked, scale, **kwargs)
        seen.append((x.double(), y[0].double().clone()))

    adapter = moe_lora_interop.read(llama.adapters["dense"])
    router = torch.from_numpy(adapter.tensors["model.layers.0.self_attn.q_proj", "router"]).double()
    with engine(llama.base, llama.adapters, dtype="bfloat16", max_loras=1) as running:
        running.load("dense")
        monkeypatch.setattr(PunicaWrapperCPU, "add_shrink", add_shrink)
        running.ask([("dense", PROMPTS[1])], 1)
    x, codes = seen[0]
    logits = codes[:, -3 * len(router) :].unflatten(-1, (-1, 3)).sum(-1).flip(-1)
    worst = (logits - x @ router.T).abs().max().item() / (x.abs() @ router.abs().T).max().item()
    measured("a bfloat16 router's logits, in three parts, relative to its sum of magnitudes", worst)
    assert worst < 1e-6
    one_part = (x @ router.bfloat16().double().T - x @ router.T).abs().max().item()
    assert one_part > 100 * (logits - x @ router.T).abs().max().item()


def test_deployments_without_the_hook_are_refused(llama, monkeypatch):
    from moe_lora_interop.vllm_plugin import touches

    with engine(llama.base, llama.adapters, max_loras=1, fully_sharded_loras=True) as running:
        with pytest.raises(Exception, match="--fully-sharded-loras: found true, expected false"):
            running.load("top2")
        asked = [(BASE, PROMPTS[0]), ("lora", PROMPTS[0])]
        assert llama.worst(asked, running.ask(asked, LENGTH)) < TOLERANCE
        # which vLLM has read when it started; on a CPU it refuses it itself
        monkeypatch.setattr(touches, "envs", types.SimpleNamespace(VLLM_LORA_ENABLE_DUAL_STREAM=True))
        with pytest.raises(Exception, match="VLLM_LORA_ENABLE_DUAL_STREAM: found true, expected false"):
            running.load("top2")


def test_two_processes_sum_the_logits_of_o_proj_and_down_proj(tmp_path, measured):
    """Each has half of their input, so half of every logit."""
    made = Made(tmp_path, "llama", ["top2", "split"])
    with engine(made.base, made.adapters, tensor_parallel_size=2, distributed_executor_backend="mp") as running:
        asked = everyone(made.adapters, PROMPTS)
        worst = made.worst(asked, running.ask(asked, LENGTH))
    measured("log-probabilities in vLLM against PEFT: tensor parallelism over 2 processes", worst)
    assert worst < TOLERANCE
