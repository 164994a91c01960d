"""What the goldens are: the base model, the inputs, and the variants of the native format."""

from typing import Any

import numpy as np

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = np.array([[3, 14, 7, 9, 5], [11, 4, 4, 8, 13]])
TASK_IDS = np.array([2, 0])

_FFN = ["gate_proj", "up_proj", "down_proj"]
_MODEL: dict[str, Any] = {"scope": "model", "router_bias": True}
_TASKS: dict[str, Any] = {"router_input": "task", "num_tasks": 3}
_BOOKKEEPING: dict[str, Any] = {
    "base_model_name_or_path": "someone/tïny-llama",
    "revision": "main",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "peft_version": "0.21.2",
}
# {name: fields}; dtypes are (of A and B, of the rest)
NATIVE: dict[str, dict[str, Any]] = {
    "dense": {},
    "top_k": {"top_k": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.5, "router_temperature": 0.7},
    "sigmoid": {"scoring_func": "sigmoid", "router_bias": True, "top_k": 2},
    "abs_softmax": {"scoring_func": "abs_softmax", "top_k": 2},
    "identity": {"scoring_func": "identity", "norm_topk_prob": False, "top_k": 2, "router_bias": True},
    "top_p": {"num_experts": 4, "top_k": 1, "top_p": 0.7, "entropy_threshold": 0.9, "entropy_index": 1.1},
    "expert_activations": {"router_input": "expert_activations", "router_bias": True, "rank_pattern": {"down_proj": 3}},
    "sparsemax": {"scoring_func": "sparsemax", "router_bias": True, "router_temperature": 2.0},
    "temperature": {"scoring_func": "sparsemax", "temperature_hidden_size": 5, "router_temperature": 0.01},
    "threshold": {"threshold": 0.35},
    "adaptive": {"threshold": 0.5, "adaptive_threshold": True, "router_bias": True},
    "shared_a": {"shared_lora_A": True, "use_rslora": True},
    "unequal": {"r": [1, 3, 2], "lora_alpha": [1, 2.5, 4]},
    "patterns": {
        "rank_pattern": {r"layers\.1\..*": 3},
        "alpha_pattern": {"down_proj": 1.5},
        "num_experts_pattern": {"q_proj": 1, r"layers\.1\.mlp\.down_proj": 4},
        "top_k": 2,
        "top_k_pattern": {r"layers\.0\..*": None},
    },
    "plain_lora": {"num_experts": 1},
    "weights": {"mix": "weights", "n_splits": 2},
    "first_pass": {**_MODEL, "scaling_pass_value": -0.4, "routed_scaling_factor": 1.5},
    "tasks": {**_TASKS, "router_depth": 0, "mix": "weights", "n_splits": 2, "scoring_func": "sigmoid"},
    "ffn": {
        "scope": "ffn",
        "target_modules": ["q_proj", *_FFN],
        "num_experts_pattern": {r"self_attn\..*": 1},
        "top_k": 2,
        "router_aux_loss": "mixtral",
        "router_aux_loss_coef": 0.001,
    },
    "model": _MODEL,
    "model_layerwise": {**_MODEL, "router_depth": 2, "router_hidden_size": 6, "layerwise": True, "top_k": 2},
    "model_tasks": {**_MODEL, **_TASKS, "task_embedding_dim": 4, "router_depth": 2, "router_hidden_size": 5},
    "model_task_table": {"scope": "model", **_TASKS, "router_depth": 0},
    "training": {
        "num_experts": 4,
        "lora_dropout": 0.05,
        "expert_dropout": 0.1,
        "router_jitter_noise": 0.01,
        "router_aux_loss": "localized",
        "router_aux_loss_delta": 0.1,
        "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 1e-3,
        "init_lora_weights": False,
        **_BOOKKEEPING,
    },
    "bfloat16": {"dtypes": ("bfloat16", "bfloat16"), "top_k": 2},
    "float16": {"dtypes": ("float16", "float16"), "router_bias": True},
    "bfloat16_experts": {"dtypes": ("bfloat16", "float32")},
    "minimal": {"num_experts": 4, "r": 2, "lora_alpha": 16},
    "peft": {"top_k": 2, **_BOOKKEEPING},
}
