"""Published methods as config values: only what differs from the defaults. Their layouts are in `dialects`."""

from typing import Any

SHARE = object()
"""Stands for 1 / num_experts."""

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv:2312.09979; its constraint needs samples marked by type, so its coefficient stays 0 here
    "loramoe": {"router_aux_loss": "localized"},
    "hydralora": {"shared_lora_A": True},  # arXiv:2404.19245
    "mola": {"top_k": 2},  # arXiv:2402.08562
    "mole": {"top_k": 2},  # arXiv:2405.00361
    "adamole": {"adaptive_threshold": True, "threshold": SHARE},  # arXiv:2405.00361
    "mixlora": {  # arXiv:2404.15159
        "scope": "ffn",
        "top_k": 2,
        "router_aux_loss": "mixtral",
        "router_aux_loss_coef": 0.001,
        "num_experts_pattern": {r"self_attn\..*": 1},
    },
    "molora": {"router_bias": True, "lora_alpha": 16},  # arXiv:2309.05444
    "arrow": {"scoring_func": "abs_softmax", "top_k": 3},  # arXiv:2405.11157
    "poly": {  # arXiv:2202.13914; with n_splits > 1 it is MHR (arXiv:2211.03831)
        "router_input": "task",
        "router_depth": 0,
        "scoring_func": "sigmoid",
        "mix": "weights",
        "lora_alpha": 1,
        "num_tasks": 1,
    },
    "moelora": {  # arXiv:2310.18339
        "scope": "model",
        "router_input": "task",
        "task_embedding_dim": 64,
        "num_tasks": 2,
    },
    "xlora": {"scope": "model", "router_bias": True},  # arXiv:2402.07148
}
