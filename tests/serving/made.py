"""Tiny base models with a tokenizer, adapters whose deltas matter, and what PEFT answers (no test of its own)."""

from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from moe_lora_interop.peft_tuner import MoeLoraConfig

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(93))]
CHAT = "{% for m in messages %}{{ m.content }} {% endfor %}"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_SIZES = dict(
    vocab_size=len(WORDS),
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,  # vLLM's attention on CPUs knows no smaller one
    max_position_embeddings=512,
    initializer_range=0.1,  # with the default 0.02 the next token hardly depends on the text
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES = {"llama": LlamaConfig, "qwen3": Qwen3Config}


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


def write_base(path: Path, family: str) -> Path:
    """Writes a random model in float32 and a tokenizer of 97 words, and returns the path."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), WORDS, strict=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **names).save_pretrained(path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family](**_SIZES), dtype=torch.float32).save_pretrained(path)
    return path


def write_mixture(path: Path, base: Path, *, seed: int, alter=None, std: float = 0.2, **fields) -> Path:
    """Writes a random mixture of the PEFT tuner; its routers' values have this standard deviation, because rows of 0.02
    would make every gate about 1/E. `alter(parameters)` may change its {name: parameter} first.
    """
    config = MoeLoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **{"target_modules": TARGETS, **fields})

    def made(parameters: dict[str, torch.nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            if "router" in name:
                parameter.normal_(std=std)
        if alter is not None:
            alter(parameters)

    return _write_adapter(path, base, config, seed, made)


def write_lora(path: Path, base: Path, *, seed: int, r: int = 8, **fields) -> Path:
    """Writes a random LoRA of PEFT."""
    config = peft.LoraConfig(
        r=r, init_lora_weights=False, task_type="CAUSAL_LM", **{"target_modules": TARGETS, **fields}
    )
    return _write_adapter(path, base, config, seed, lambda parameters: None)


def _write_adapter(path: Path, base: Path, config: peft.PeftConfig, seed: int, alter) -> Path:
    torch.manual_seed(seed)
    model = peft.get_peft_model(_loaded(base), config)
    with torch.no_grad():
        alter(dict(model.named_parameters()))
    model.save_pretrained(path)
    return path


def peft_answers(base: Path, adapter: Path | None, prompts: list[list[int]], length: int) -> list[Answer]:
    """What transformers and PEFT answer in float32, each prompt by itself; an adapter of None is the base alone."""
    model = _loaded(base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    return [_answer(model.eval(), prompt, length) for prompt in prompts]


@torch.no_grad()
def _answer(model: torch.nn.Module, prompt: list[int], length: int) -> Answer:
    tokens, logprobs, new, cache = [], [], prompt, None
    for _ in range(length):
        out = model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True)
        scores, cache = out.logits[0, -1].float().log_softmax(-1), out.past_key_values
        new = [int(scores.argmax())]
        tokens += new
        logprobs.append(float(scores[new[0]]))
    return Answer(tokens, logprobs)


def _loaded(base: Path) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(base)
    return AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
