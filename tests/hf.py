"""Tiny randomly initialised transformers models: the independent truth for the base models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

VOCAB = 97
_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,  # scores of order one: with the default 0.02, attention is uniform and tests nothing
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=None,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN_ROPE = dict(
    rope_type="yarn",
    rope_theta=1e4,
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=4.0,
    beta_slow=1.0,
)


def default_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


_GEMMA = dict(
    head_dim=8,
    num_hidden_layers=3,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    sliding_window=5,
    query_pre_attn_scalar=24,
    tie_word_embeddings=True,
    pad_token_id=0,
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(rope_parameters=default_rope(1e4))),
    "llama_theta_1e6": ("Llama", dict(rope_parameters=default_rope(1e6))),
    "llama3_rope": ("Llama", dict(rope_parameters=LLAMA3_ROPE)),
    "llama_linear_rope": ("Llama", dict(rope_parameters={**default_rope(1e4), "rope_type": "linear", "factor": 4.0})),
    "llama_tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama_biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama_head_dim": ("Llama", dict(head_dim=16, num_key_value_heads=4, hidden_act="gelu")),
    "mistral": ("Mistral", dict(sliding_window=5)),
    "mistral_full": ("Mistral", dict(sliding_window=None, num_key_value_heads=1)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True, rope_parameters=default_rope(1e6))),
    "qwen2_windows": ("Qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3_windows": (
        "Qwen3",
        dict(
            head_dim=8,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            attention_bias=True,
        ),
    ),
    "gemma2": ("Gemma2", dict(_GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=0.5)),
    "gemma3": (
        "Gemma3",
        dict(
            _GEMMA,
            rope_parameters={"full_attention": default_rope(1e6), "sliding_attention": default_rope(1e4)},
        ),
    ),
}

# of the families that came later: tests/test_models_families.py looks at them all at once
LATER: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", dict(head_dim=16, num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0)),
    "gemma_biases": ("Gemma", dict(head_dim=8, attention_bias=True, hidden_act="relu", pad_token_id=0)),
    "granite": (
        "Granite",
        dict(embedding_multiplier=12, residual_multiplier=0.22, attention_multiplier=0.6, logits_scaling=3),
    ),
    "granite_biases": (
        "Granite",
        dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, num_key_value_heads=4, head_dim=16),
    ),
    "smollm3": ("SmolLM3", dict(no_rope_layer_interval=2, tie_word_embeddings=True, pad_token_id=0)),
    "smollm3_windows": (
        "SmolLM3",
        dict(
            num_hidden_layers=3,
            no_rope_layers=[0, 1, 1],
            use_sliding_window=True,
            sliding_window=5,
            attention_bias=True,
            mlp_bias=True,
            head_dim=16,
            pad_token_id=0,
        ),
    ),
    "olmo2": ("Olmo2", dict(pad_token_id=1)),
    "olmo2_biases": ("Olmo2", dict(attention_bias=True, tie_word_embeddings=True, head_dim=16, pad_token_id=1)),
    "olmo3": ("Olmo3", dict(num_hidden_layers=4, sliding_window=5, pad_token_id=1)),
    "olmo3_yarn": (
        "Olmo3",
        dict(
            layer_types=["full_attention", "sliding_attention"],
            sliding_window=5,
            num_key_value_heads=4,
            pad_token_id=1,
            rope_parameters={
                "full_attention": {**YARN_ROPE, "attention_factor": 1.3},
                "sliding_attention": default_rope(1e4),
            },
        ),
    ),
    "ministral3": (
        "Ministral3",
        dict(
            head_dim=16,
            pad_token_id=0,
            rope_parameters={
                **YARN_ROPE,
                "original_max_position_embeddings": 6,
                "mscale": 1.5,
                "mscale_all_dim": 0.5,
                "llama_4_scaling_beta": 0.7,
            },
        ),
    ),
    "ministral3_window": (
        "Ministral3",
        dict(
            sliding_window=5,
            head_dim=8,
            tie_word_embeddings=True,
            pad_token_id=0,
            rope_parameters={
                **default_rope(1e4),
                "original_max_position_embeddings": 10,
                "llama_4_scaling_beta": 0.7,
            },
        ),
    ),
    "phi3": ("Phi3", dict(pad_token_id=0)),
    "phi3_longrope": (
        "Phi3",
        dict(
            tie_word_embeddings=True,
            sliding_window=20,
            hidden_size=64,
            pad_token_id=0,
            max_position_embeddings=128,
            original_max_position_embeddings=24,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            },
        ),
    ),
    "cohere2": (
        "Cohere2",
        dict(num_hidden_layers=4, sliding_window=5, tie_word_embeddings=True, logit_scale=0.3, pad_token_id=0),
    ),
    "cohere2_biases": (
        "Cohere2",
        dict(
            attention_bias=True,
            logit_scale=0.4,
            layer_types=["full_attention", "sliding_attention"],
            sliding_window=5,
            pad_token_id=0,
        ),
    ),
}


def make_model(case: str, *, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """The named tiny model in float32 with eager attention. One-dimensional weights are random too, not 1 or 0."""
    family, settings = (CASES | LATER)[case]
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    config = config_class(**{**_COMMON, **settings, **overrides})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        if config.tie_word_embeddings:  # or the embedding dominates and every model just repeats its last token
            model.model.embed_tokens.weight.mul_(0.25)
    return model.eval()


def save_model(model: torch.nn.Module, directory: Path, **options: Any) -> Path:
    """`save_pretrained`; returns the directory."""
    model.save_pretrained(directory, **options)
    return directory


class Saved:
    """case -> (transformers model, the directory it is saved in), made on first use."""

    def __init__(self, tmp_path_factory: pytest.TempPathFactory):
        self._factory = tmp_path_factory
        self._made: dict[str, tuple[torch.nn.Module, Path]] = {}

    def __call__(self, case: str) -> tuple[torch.nn.Module, Path]:
        if case not in self._made:
            model = make_model(case)
            self._made[case] = model, save_model(model, self._factory.mktemp(case))
        return self._made[case]

    def copy(self, case: str, directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], Callable[[], Path]]:
        """config.json as a dict, the tensors, and a function that writes both, as they are then, to `directory`."""
        source = self(case)[1]
        config = json.loads((source / "config.json").read_text())
        tensors = load_file(source / "model.safetensors")

        def write() -> Path:
            (directory / "config.json").write_text(json.dumps(config))
            save_file(tensors, directory / "model.safetensors")
            return directory

        return config, tensors, write
