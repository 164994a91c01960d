"""A vLLM engine in this process, adapters of every rule, and what PEFT answers with them (no test of its own)."""

import functools
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tests.serving.made import Answer, peft_answers, write_base, write_lora, write_mixture

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class Engine:
    """Answers of `adapters`, {name: path}; None is the base.

    Attributes:
        cached_tokens: of each prompt asked last, how many came from the prefix cache.
    """

    def __init__(self, llm, adapters: dict[str, Path]):
        self.llm = llm
        self.adapters = dict(adapters)
        self.cached_tokens: list[int] = []
        self.numbers: dict[str, int] = {}

    def request(self, name: str | None):
        """vLLM's word for an adapter."""
        from vllm.lora.request import LoRARequest

        if name is None:
            return None
        number = self.numbers.setdefault(name, len(self.numbers) + 1)
        return LoRARequest(name, number, str(self.adapters[name]))

    def ask(self, asked: Sequence[tuple[str | None, Sequence[int]]], length: int) -> list[Answer]:
        """Greedy answers to (adapter, prompt), all at once."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(prompt)} for _, prompt in asked]
        params = SamplingParams(temperature=0, max_tokens=length, logprobs=0, ignore_eos=True, detokenize=False)
        requests = [self.request(name) for name, _ in asked]
        found = self.llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        self.cached_tokens = [one.num_cached_tokens for one in found]
        return [_answer(one.outputs[0]) for one in found]

    def load(self, name: str) -> None:
        """Loads an adapter before it is asked; an error here leaves the engine alive."""
        self.llm.llm_engine.add_lora(self.request(name))

    @property
    def runner(self):
        """vLLM's, with its model and its LoRA manager."""
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def _answer(output) -> Answer:
    logprobs = [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)]
    return Answer(list(output.token_ids), logprobs)


@contextmanager
def engine(base: Path, adapters: dict[str, Path], **arguments) -> Iterator[Engine]:
    """An engine, whose memory is given back afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = dict(dtype="float32", max_model_len=512, max_loras=len(adapters) or 1, max_lora_rank=64)
    llm = LLM(str(base), enable_lora=True, **{**defaults, **arguments})
    try:
        yield Engine(llm, adapters)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


LENGTH, TOLERANCE = 16, 3e-5
PROMPTS = [[5, 9, 33, 20], [7, 80, 12, 4, 15, 60, 61]]
LONG = [4 + (7 * i * i + 3 * i) % 90 for i in range(300)]
BASE = None


def learned_threshold(parameters):
    for name, parameter in parameters.items():
        if "moe_lora_threshold" in name:
            parameter.normal_(std=0.5)


MIXTURES = {
    "top2": dict(num_experts=4, r=4, lora_alpha=4, top_k=2, router_bias=True, routed_scaling_factor=1.5),
    "dense": dict(num_experts=8, r=4, router_temperature=2.0),
    "unequal": dict(
        num_experts=3,
        r=[2, 8, 4],
        lora_alpha=[4.0, 16.0, 2.0],
        use_rslora=True,
        top_k=2,
        norm_topk_prob=False,
        num_experts_pattern={"down_proj": 1, "k_proj": 5},
        rank_pattern={"down_proj": 3, "k_proj": 2},
        alpha_pattern={"down_proj": 6.0, "k_proj": 4.0},
    ),
    "adaptive": dict(num_experts=4, r=4, lora_alpha=4, threshold=0.5, adaptive_threshold=True, alter=learned_threshold),
    "hydra": dict(num_experts=4, r=4, shared_lora_A=True, scoring_func="sigmoid", top_k=3),
    "sparsemax": dict(num_experts=6, r=4, scoring_func="sparsemax", target_modules=["q_proj", "v_proj", "down_proj"]),
    "split": dict(num_experts=4, r=4, lora_alpha=4, top_k=1, target_modules=["o_proj", "down_proj"]),
    "arrow": dict(num_experts=6, r=2, lora_alpha=2, scoring_func="abs_softmax", threshold=0.1),
}


class Made:
    """A base model, its adapters, and what PEFT answers."""

    def __init__(self, path, family, names):
        self.base = write_base(path / "base", family)
        self.adapters = {
            name: write_mixture(path / name, self.base, seed=seed, **MIXTURES[name]) for seed, name in enumerate(names)
        }
        self.adapters["lora"] = write_lora(path / "lora", self.base, seed=90)

    @functools.cache  # noqa: B019  as long as its module's tests run
    def expected(self, name: str | None, prompt: tuple[int, ...], length: int) -> Answer:
        path = None if name is None else self.adapters[name]
        return peft_answers(self.base, path, [list(prompt)], length)[0]

    def worst(self, asked, found, length=LENGTH) -> float:
        """The largest difference of log-probabilities; the tokens are the same."""
        worst = 0.0
        for (name, prompt), answer in zip(asked, found, strict=True):
            expected = self.expected(name, tuple(prompt), length)
            assert answer.tokens == expected.tokens, (name, answer, expected)
            worst = max(worst, np.abs(np.subtract(answer.logprobs, expected.logprobs)).max())
        return float(worst)


def everyone(adapters, prompts):
    """Every prompt for the base and for every adapter."""
    return [(name, prompt) for prompt in prompts for name in (BASE, *adapters)]
