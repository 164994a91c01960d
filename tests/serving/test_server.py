"""A server of vLLM with the plugin, asked as users do: mixtures beside plain LoRAs and the base, against PEFT."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.serving.made import WORDS, peft_answers, write_base, write_lora, write_mixture
from tests.serving.server import (
    BASE,
    Server,
    assert_same,
    lora_modules,
    not_starting,
    serving,
    skip_without_vllm,
)

skip_without_vllm()
LENGTH = 24
LONG = 120  # the shortest prompts begin while the longest still come in chunks
RANK = 64
LORA = ["--enable-lora", "--max-lora-rank", str(RANK)]
# fewer slots than adapters, so that some are evicted; prompts longer than a step's tokens come in chunks
SLOTS = ["--max-loras", "4", "--max-cpu-loras", "8", "--max-num-batched-tokens", "256", "--enable-prefix-caching"]


@dataclass(frozen=True)
class Served:
    """A running server, its base, and {name: directory} of the adapters that it was started with."""

    server: Server
    base: Path
    adapters: dict[str, Path]

    def of_peft(self, name, prompts, length=LENGTH):
        return peft_answers(self.base, self.adapters.get(name), prompts, length)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def served(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    base = write_base(path / "base", request.param)
    rules = dict(scoring_func="sigmoid", router_bias=True, router_temperature=0.7, routed_scaling_factor=1.5)
    adapters = {
        "mixture": write_mixture(path / "mixture", base, seed=1, r=4, lora_alpha=16, num_experts=4, top_k=2),
        "ruled": write_mixture(path / "ruled", base, seed=2, r=2, lora_alpha=8, num_experts=8, top_k=3, **rules),
        "lora": write_lora(path / "lora", base, seed=3, r=8, lora_alpha=16),
        "larger": write_lora(path / "larger", base, seed=4, r=32, lora_alpha=32),
    }
    with serving(base, path / "log", *LORA, *SLOTS, *lora_modules(adapters)) as server:
        yield Served(server, base, adapters)


def prompts(number, seed=0, low=3, high=20):
    rng = np.random.default_rng(seed)
    return [rng.integers(4, len(WORDS), int(rng.integers(low, high))).tolist() for _ in range(number)]


def in_one_batch(events):
    """Whether every answer had begun before one ended."""
    ended = [kind for kind, _ in events].index("end")
    return ended == sum(kind == "begin" for kind, _ in events)


@pytest.mark.parametrize("time", ["first", "again"])  # the second time the prompts are in the prefix cache
def test_mixtures_loras_and_the_base_in_one_batch(served, time, measured):
    (prompt,) = prompts(1)
    names = [*served.adapters, BASE]
    answers, events = served.server.ask_at_once([(name, prompt) for name in names], LONG)
    assert in_one_batch(events)
    assert_same(answers, [served.of_peft(name, [prompt], LONG)[0] for name in names], measured, "one batch")
    assert len({tuple(answer.tokens) for answer in answers}) == len(names), "no two say the same"


def test_the_base_is_unchanged_next_to_a_mixture(served, measured):
    many = prompts(4, seed=1)
    asked = [(BASE, many[0]), ("mixture", many[1]), (BASE, many[2]), ("ruled", many[3])]
    answers, events = served.server.ask_at_once(asked, LONG)
    assert in_one_batch(events)
    assert_same([answers[0], answers[2]], served.of_peft(BASE, [many[0], many[2]], LONG), measured, "the base")


def test_a_prompt_that_comes_in_chunks(served, measured):
    long, *short = prompts(1, seed=2, low=300, high=301) + prompts(2, seed=3)
    asked = [("mixture", long), ("lora", short[0]), (BASE, short[1]), ("ruled", long), (BASE, long)]
    answers, _ = served.server.ask_at_once(asked, LENGTH)
    assert_same(answers, [served.of_peft(name, [p])[0] for name, p in asked], measured, "chunks")


def test_a_streamed_chat(served):
    words = "w5 w31 w7"
    asked = dict(model="mixture", messages=[{"role": "user", "content": words}], max_tokens=8, temperature=0)
    chat = served.server.client.chat.completions
    ignore = {"extra_body": {"ignore_eos": True}}
    pieces = [c.choices[0].delta.content or "" for c in chat.create(stream=True, **asked, **ignore) if c.choices]
    tokenizer = AutoTokenizer.from_pretrained(served.base)
    ids = tokenizer.apply_chat_template(asked["messages"], add_generation_prompt=True, return_dict=False)
    (expected,) = served.of_peft("mixture", [ids], 8)
    text = tokenizer.decode(expected.tokens, skip_special_tokens=True)
    assert "".join(pieces).split() == text.split() and len(pieces) > 4
    assert chat.create(**asked, **ignore).choices[0].message.content.split() == text.split()


def test_64_requests_over_4_adapters_answer_as_each_alone(served, measured):
    asked = [(name, prompt) for prompt in prompts(16, seed=4) for name in served.adapters]
    alone = [served.server.ask(*one, LENGTH) for one in asked]
    together, events = served.server.ask_at_once(asked, LENGTH)
    kinds = [kind for kind, _ in events]
    running = np.cumsum([1 if kind == "begin" else -1 for kind in kinds])
    assert running.max() > 32, "they were not at once"
    assert_same(together, alone, measured, "64 requests")
    for number, name in enumerate(served.adapters):
        assert_same([alone[number]], served.of_peft(name, [asked[number][1]]), measured, "64 requests")


def test_adapters_come_and_go_at_run_time(served, tmp_path, measured):
    server, many = served.server, prompts(2, seed=5)
    fields = dict(r=3, lora_alpha=12, num_experts=3, threshold=0.4, adaptive_threshold=True)
    fields |= dict(norm_topk_prob=False)  # or a gate jumps from 0 to 1 where p is tau, which rounding decides
    late = write_mixture(tmp_path / "late", served.base, seed=6, **fields)
    other = write_mixture(tmp_path / "other", served.base, seed=7, **fields)
    assert not server.knows("late")
    assert server.load("late", late).ok
    assert "already been loaded" in server.load("late", other).json()["error"]["message"]
    found = [server.ask("late", prompt, LENGTH) for prompt in many]
    assert_same(found, peft_answers(served.base, late, many, LENGTH), measured, "loaded at run time")
    # five adapters, four slots: each of these was evicted, or evicts another
    for name in served.adapters:
        assert_same([server.ask(name, many[0], LENGTH)], served.of_peft(name, many[:1]), measured, "evicted")
    assert server.unload("late").ok
    assert not server.knows("late")
    assert server.load("late", other).ok
    asked = [("late", many[0]), ("mixture", many[1]), (BASE, many[1])]
    answers, _ = server.ask_at_once(asked, LENGTH)
    assert_same(answers[:1], peft_answers(served.base, other, many[:1], LENGTH), measured, "loaded again")
    assert_same(answers[1:2], served.of_peft("mixture", many[1:]), measured, "loaded again")
    assert_same(answers[2:], served.of_peft(BASE, many[1:]), measured, "loaded again")
    assert server.unload("late").ok


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # PEFT saves lm_head, too
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scope": "ffn", "num_experts_pattern": {r"self_attn\..*": 1}}, ["scope: found ffn", "--as mixtral"]),
        ({"scope": "model", "target_modules": ["q_proj"]}, ["scope: found model", "--as lora --gates"]),
        (
            {"router_input": "task", "router_depth": 0, "num_tasks": 2, "target_modules": ["q_proj"]},
            ["router_input: found task", "--as lora --task"],
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, ["lm_head"]),
        ({"target_modules": ["q_proj"], "r": 32}, ["--max-lora-rank"]),
    ],
    ids=["ffn", "model", "task", "lm_head", "rank"],
)
def test_what_it_cannot_serve_is_refused_with_the_road(served, tmp_path, fields, words):
    refused = write_mixture(tmp_path / "refused", served.base, seed=8, **{"r": 2, "num_experts": 4, **fields})
    answer = served.server.load("refused", refused)
    assert not answer.ok
    message = answer.json()["error"]["message"]
    assert [w for w in words if w not in message] == [], message
    prompt = prompts(1)[0]
    assert_same([served.server.ask("mixture", prompt, 4)], served.of_peft("mixture", [prompt], 4))


def test_what_it_cannot_serve_stops_the_start(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    refused = write_mixture(tmp_path / "ffn", base, seed=9, scope="ffn", r=2, target_modules=["up_proj", "down_proj"])
    arguments = [*LORA, "--fully-sharded-loras", *lora_modules({"refused": refused})]
    log = not_starting(base, tmp_path / "log", *arguments)
    assert "--fully-sharded-loras: found true" in log
    log = not_starting(base, tmp_path / "log", *LORA, *lora_modules({"refused": refused}))
    assert "scope: found ffn" in log and "--as mixtral" in log
