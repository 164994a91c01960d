"""What the tests of the PEFT tuner share: tiny models, and the gates by hand (no test of its own)."""

import itertools
from collections.abc import Iterator

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

import moe_lora_interop.peft_tuner as tuner
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from tests.numpy_mixture import sparsemax

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
        ("softmax", "abs_softmax", "sigmoid", "identity", "sparsemax"), SELECTIONS.items(), (True, False)
    ):
        fields = {"scoring_func": scoring, "norm_topk_prob": norm, "num_experts": 4} | selection
        if scoring == "abs_softmax" and name == "adaptive":
            continue
        if scoring == "identity" and (norm or "threshold" in selection):
            continue
        if not norm and name == "dense" and scoring not in ("sigmoid", "identity"):
            continue
        yield pytest.param(fields, id=f"{scoring}-{name}-{'norm' if norm else 'raw'}")


COMBINATIONS = list(_combinations())


def gates_by_hand(z: np.ndarray, c: MoeLoraConfig, top_k: int | None, tau: float | None) -> np.ndarray:
    """One token: z [expert] -> g [expert], in float64."""
    score = np.abs(z) if c.scoring_func == "abs_softmax" else z
    if c.scoring_func == "identity":
        p = score
    elif c.scoring_func == "sigmoid":
        p = 1 / (1 + np.exp(-score))
    elif c.scoring_func == "sparsemax":
        p = sparsemax(score)
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


# --- routers that do not stand at a linear layer ---------------------------------------------------------------------

MLP = ["gate_proj", "up_proj", "down_proj"]
TASKS = {"router_input": "task", "num_tasks": 4}
FIELDS = {
    "ffn": {"scope": "ffn", "target_modules": MLP, "router_bias": True, "top_k": 2},
    "ffn_dense": {"scope": "ffn", "target_modules": [*MLP, "q_proj"], "num_experts_pattern": {"q_proj": 1}},
    "ffn_adaptive": {"scope": "ffn", "target_modules": ["up_proj"], "threshold": 0.4, "adaptive_threshold": True},
    "ffn_temperature": {
        "scope": "ffn",
        "target_modules": ["up_proj"],
        "scoring_func": "sparsemax",
        "router_temperature": 2.0,
        "temperature_hidden_size": 3,
    },
    "model": {"scope": "model", "top_k": 2},
    "layerwise": {"scope": "model", "router_depth": 2, "router_hidden_size": 5, "router_bias": True, "layerwise": True},
    "first_pass": {"scope": "model", "layerwise": True, "scaling_pass_value": 0.5},
    "embedding": {"scope": "model", **TASKS, "task_embedding_dim": 5},
    "table": {"scope": "model", **TASKS, "router_depth": 0},
    "poly": {**TASKS, "router_depth": 0, "mix": "weights", "n_splits": 2, "scoring_func": "sigmoid"},
}
IDS = [3, 1]
every_scope = pytest.mark.parametrize("name", FIELDS)


def random_(model: nn.Module, seed: int = 3) -> nn.Module:
    """The model in evaluation mode with all of its adapters' parameters large and random."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "moe_lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def wrapped(name: str, base: nn.Module | None = None, adapter: str = "default", **more) -> peft.PeftModel:
    """A model with a random adapter of one of the kinds of `FIELDS`."""
    model = tiny_llama() if base is None else base
    return random_(peft.get_peft_model(model, config(**(FIELDS[name] | more)), adapter_name=adapter))


def out(model: nn.Module, name: str, ids: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    """Logits, by task where the kind of adapter needs it."""
    ids = input_ids() if ids is None else ids
    with torch.set_grad_enabled(kwargs.pop("grad", False)):
        if "num_tasks" not in FIELDS[name]:
            return model(ids, **kwargs).logits
        with tuner.task_routing(model, IDS):
            return model(ids, **kwargs).logits


def loaded(path, base: nn.Module | None = None, **kwargs) -> peft.PeftModel:
    """The adapter in this directory on a model."""
    return peft.PeftModel.from_pretrained(tiny_llama() if base is None else base, path, **kwargs)
