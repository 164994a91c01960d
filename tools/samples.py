"""A small random adapter for every layout that is written, as the program that owns the layout would make one."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.checkpoint.implied_tensors import expected_tensors
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.rules.tensors import axes_of

_ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")
_FFN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SIZES = {"in": 8, "out": 12, "dim": 4, "unit": 6}
"""Sizes of the axes that no config determines; divisible by two splits."""

_SIZES: dict[str, Any] = {"r": 2, "num_experts": 4, "lora_alpha": 4}
_PLAIN_ATTENTION = {"num_experts_pattern": {r"self_attn\..*": 1}}
_XLORA = {"router_depth": 2, "router_hidden_size": 6, "layerwise": True, "top_k": 2, "norm_topk_prob": False}
_EWORA = {
    "router_input": "expert_activations",
    "router_bias": True,
    "scoring_func": "identity",
    "norm_topk_prob": False,
}
_LD_MOLE = {"scoring_func": "sparsemax", "router_temperature": 0.01, "temperature_hidden_size": 3}
_UNLIKE = {"v_proj": 3}
_SIGNED = {"scoring_func": "identity", "norm_topk_prob": False, "scaling_pass_value": 0.3}
# {layout: (preset or "", fields, modules of a layer)}
SAMPLES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "native": (
        "",
        {"r": [1, 3, 2, 2], "scoring_func": "sigmoid", "router_bias": True, "expert_dropout": 0.1},
        _ATTENTION,
    ),
    "loramoe": ("loramoe", {"router_aux_loss_coef": 0.1, "router_aux_loss_delta": 0.2}, _FFN),
    "ld-mole": ("loramoe", _LD_MOLE, _FFN),
    "hydralora": ("hydralora", {}, _ATTENTION),
    "moe-peft-loramoe": ("", _PLAIN_ATTENTION, (*_ATTENTION, *_FFN)),
    "moe-peft-mola": ("mola", {}, (*_ATTENTION, *_FFN)),
    "dynmole": (
        "",
        {"top_k": 1, "top_p": 0.7, "entropy_threshold": 0.9, "entropy_index": 1.1, "norm_topk_prob": False},
        _ATTENTION,
    ),
    "ewora": ("", {"lora_alpha": 2, **_EWORA, "rank_pattern": _UNLIKE, "alpha_pattern": _UNLIKE}, _ATTENTION),
    "mixlora": ("mixlora", {"router_aux_loss": "switch", "router_aux_loss_coef": 0.0}, (*_ATTENTION, *_FFN)),
    "mixlora-legacy": ("mixlora", {"router_aux_loss": "switch", "router_aux_loss_coef": 0.0}, (*_ATTENTION, *_FFN)),
    "mola": (
        "mola",
        {
            "num_experts_pattern": {r"layers\.0\..*": 2},
            "top_k_pattern": {r"layers\.0\..*": 1},
            "rank_pattern": {r"layers\.1\..*": 3},
            "r": 3,
        },
        _ATTENTION,
    ),
    "mole": ("mole", {}, _ATTENTION),
    "adamole": ("adamole", {}, _ATTENTION),
    "goat": ("mole", {}, _ATTENTION),
    "for-ai-molora": ("molora", {"lora_alpha": 16}, _ATTENTION),
    "arrow": ("arrow", {"r": [1, 2, 3, 2], "lora_alpha": [1, 2, 3, 4]}, _ATTENTION),
    "poly": ("poly", {"lora_alpha": 1, "num_tasks": 3, "n_splits": 2}, _ATTENTION),
    "moelora": ("moelora", {"task_embedding_dim": 4, "num_tasks": 3}, _ATTENTION),
    "coin": ("", {}, _ATTENTION),
    "meteora": ("mola", {"lora_alpha": [4, 1, 2, 3], "router_temperature": 1.5}, _ATTENTION),
    "xlora": ("xlora", {**_XLORA, "r": [1, 2, 3, 2], "routed_scaling_factor": 2.0}, _ATTENTION),
    "xlora-original": ("xlora", {**_SIGNED, "r": [1, 2, 3, 2], "lora_alpha": [1, 2, 3, 4]}, _ATTENTION),
    "peft-router": ("xlora", {}, _ATTENTION),
    "lora": ("", {"num_experts": 1, "rank_pattern": {"v_proj": 3}}, _ATTENTION),
}


def sample(layout: str, *, seed: int = 0, layers: int = 2) -> Adapter:
    """A random adapter that `layout` can hold; float32."""
    preset, fields, kinds = SAMPLES[layout]
    modules = [f"model.layers.{n}.{kind}" for n in range(layers) for kind in kinds]
    values = {"target_modules": modules, **_SIZES, **fields}
    config = MoeLoraConfig.preset(preset, **values) if preset else MoeLoraConfig(**values)
    return random_adapter_for(layout, config, modules, seed=seed)


def random_adapter_for(layout: str, config: MoeLoraConfig, modules: list[str], *, seed: int = 0) -> Adapter:
    """`random_adapter`, with what `layout` stores once equal in all modules that share it."""
    adapter = random_adapter(config, modules, seed=seed)
    return with_shared_temperatures(adapter) if layout == "ld-mole" else adapter


def with_shared_temperatures(adapter: Adapter) -> Adapter:
    """The adapter with one temperature network for all modules of equally many inputs, as LD-MoLE has it."""
    tensors, firsts = dict(adapter.tensors), {}
    for (module, role), tensor in adapter.tensors.items():
        if role.startswith("temperature_"):
            tensors[module, role] = firsts.setdefault((role, adapter.tensors[module, "router"].shape[1]), tensor)
    return Adapter(adapter.config, tensors)


def random_adapter(config: MoeLoraConfig, modules: list[str], *, seed: int = 0) -> Adapter:
    """Random tensors for a config: N(0, 1), zero beyond each expert's own rank."""
    rng = np.random.default_rng(seed)
    tensors: dict[tuple[str, str], np.ndarray] = {}
    for (module, role), known in expected_tensors(config, modules).items():
        shape = [_size(axis, known) for axis in axes_of(role).split()]
        tensors[module, role] = rng.standard_normal(shape).astype(np.float32)
    for module in modules:
        ranks = config.for_module(module).ranks
        for expert, rank in enumerate(ranks):
            if not config.shared_lora_A:
                tensors[module, "lora_A"][expert, rank:] = 0
            tensors[module, "lora_B"][expert, :, rank:] = 0
    return Adapter(config, tensors)


def _size(axis: str, known: Mapping[str, int]) -> int:
    return known.get(axis, SIZES.get(axis, 0))
