"""What the tests of the PEFT tuner share: tiny models, and the gates by hand (no test of its own)."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

import interop.peft_tuner as tuner
from interop.config import MoeLoraConfig

torch.set_num_threads(1)  # for matrices this small, threads only wait for each other

# warnings are errors; these two libraries warn of each other
THIRD_PARTY_WARNINGS = [
    # peft 0.21.2 reads the attribute that transformers 5.24 renamed, in PeftModel.__init__
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    """The same random Llama for the same seed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).to(dtype).eval()


def tiny_classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3)).eval()


def config(**changes) -> tuner.MoeLoraConfig:
    """A small mixture that is not the identity."""
    fields = {"r": 2, "lora_alpha": 6, "num_experts": 3, "target_modules": ["q_proj", "down_proj"]}
    return tuner.MoeLoraConfig(**(fields | {"init_lora_weights": False} | changes))


def input_ids(batch: int = 2, seq: int = 7) -> torch.Tensor:
    return torch.randint(3, 97, (batch, seq), generator=torch.Generator().manual_seed(1))


def logits(model: PreTrainedModel, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids(), **kwargs).logits


SELECTIONS = {
    "dense": {},
    "top_1": {"top_k": 1},
    "top_2": {"top_k": 2},
    "threshold": {"threshold": 0.3},
    "adaptive": {"threshold": 0.5, "adaptive_threshold": True},
}


def _combinations() -> Iterator:
    """Every scoring x selection x norm that a config allows."""
    for scoring, (name, selection), norm in itertools.product(
        ("softmax", "abs_softmax", "sigmoid"), SELECTIONS.items(), (True, False)
    ):
        fields = {"scoring_func": scoring, "norm_topk_prob": norm, "num_experts": 4} | selection
        if scoring == "abs_softmax" and name == "adaptive":
            continue
        if not norm and name == "dense" and scoring != "sigmoid":
            continue
        yield pytest.param(fields, id=f"{scoring}-{name}-{'norm' if norm else 'raw'}")


COMBINATIONS = list(_combinations())


def gates_by_hand(z: np.ndarray, c: MoeLoraConfig, top_k: int | None, tau: float | None) -> np.ndarray:
    """One token: z [expert] -> g [expert], in float64."""
    score = np.abs(z) if c.scoring_func == "abs_softmax" else z
    if c.scoring_func == "sigmoid":
        p = 1 / (1 + np.exp(-score))
    else:
        p = np.exp(score - score.max())
        p = p / p.sum()
    if top_k is not None:
        kept = sorted(range(len(p)), key=lambda e: (-p[e], e))[:top_k]
    elif c.threshold is not None:
        kept = [e for e in range(len(p)) if p[e] >= tau]
    else:
        kept = list(range(len(p)))
    g = np.zeros_like(p)
    for e in kept:
        g[e] = p[e] - tau if c.adaptive_threshold else p[e]
    if c.norm_topk_prob and g.sum() > 0:
        g = g / g.sum()
    return g
