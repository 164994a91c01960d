"""What PEFT's tests are run on: MOE_LORA cases for their parameter lists, and tiny stand-ins for their hub models."""

from pathlib import Path
from typing import Any

from moe_lora_interop.peft_tuner import MoeLoraConfig

MLP: dict[str, dict[str, Any]] = {
    "lin0 as str": {"target_modules": "lin0"},
    "lin0 as list": {"target_modules": ["lin0"]},
    "lin1": {"target_modules": ["lin1"]},
    "both": {"target_modules": ["lin0", "lin1"]},
    "module to save": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    "top-1 of softmax": {"target_modules": ["lin0"], "top_k": 1, "norm_topk_prob": False},
    "top-2": {"target_modules": ["lin0", "lin1"], "top_k": 2},
    "sigmoid": {"target_modules": ["lin0"], "scoring_func": "sigmoid", "router_bias": True},
    "threshold": {"target_modules": ["lin0"], "threshold": 0.2},
    "adaptive": {
        "target_modules": ["lin0"],
        "threshold": 0.5,
        "adaptive_threshold": True,
        "norm_topk_prob": False,
    },
    "shared A": {"target_modules": ["lin0", "lin1"], "shared_lora_A": True},
    "unequal ranks": {"target_modules": ["lin0"], "r": [1, 2, 3, 4], "lora_alpha": [1.0, 2.0, 3.0, 4.0]},
    "rank pattern": {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin0": 3}, "use_rslora": True},
    "one expert": {"target_modules": ["lin0"], "num_experts": 1},
}
QUICK_MLP = ("both", "module to save", "top-2")

# test_name, model_id, config_cls, config_kwargs
TEST_CASES = [
    *((f"MLP {name}", "MLP", MoeLoraConfig, fields) for name, fields in MLP.items()),
    ("Conv1D of transformers", "EmbConv1D", MoeLoraConfig, {"target_modules": ["conv1d"]}),
    ("Conv1D and linear", "EmbConv1D", MoeLoraConfig, {"target_modules": ["conv1d", "lin0"], "top_k": 2}),
]

_SAME = {"target_modules": ["lin0"], "init_lora_weights": False}
_OTHER = {"target_modules": ["lin1"], "init_lora_weights": False, "num_experts": 3, "r": 2}
# test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [
    ("MOE_LORA same", "moe_lora", MoeLoraConfig, _SAME, _SAME),
    ("MOE_LORA different", "moe_lora", MoeLoraConfig, _SAME, _OTHER),
    ("MOE_LORA top-k", "moe_lora", MoeLoraConfig, _SAME | {"top_k": 1}, _OTHER | {"top_k": 2}),
]

# config_cls, config_kwargs
ALL_CONFIGS = [
    (MoeLoraConfig, {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16}),
    (MoeLoraConfig, {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "top_k": 2, "scoring_func": "sigmoid"}),
    (MoeLoraConfig, {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "target_modules": "all-linear"}),
]

TABLES: dict[str, list] = {
    "TEST_CASES": TEST_CASES,
    "ALL_PEFT_CONFIG_CLASSES": [MoeLoraConfig],
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES,
    "ALL_CONFIGS": ALL_CONFIGS,
}

QUICK: dict[str, list] = TABLES | {
    "TEST_CASES": [case for case in TEST_CASES if case[0].removeprefix("MLP ") in QUICK_MLP],
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[1:2],
    "ALL_CONFIGS": ALL_CONFIGS[1:2],
    "PEFT_DECODER_MODELS_TO_TEST": ["trl-internal-testing/tiny-random-LlamaForCausalLM"],
}

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # the usual 0.02 leaves logits of a model this small nearly equal
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# the hub ids that PEFT's decoder tests name, and a local stand-in of the same architecture: model_type, sizes
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "opt",
        {k: v for k, v in _SIZES.items() if k not in ("intermediate_size", "num_key_value_heads", "initializer_range")}
        | {"ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.2, "dropout": 0.0},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("gptj", _GPT | {"rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", _SIZES),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", _SIZES),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("gemma3_text", _SIZES | {"head_dim": 4}),
}


def build_models(root: Path) -> None:
    """Writes the stand-ins as the Hub's cache at `root` has them: with HF_HUB_CACHE=`root`, PEFT's tests find them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for hub_id, (model_type, sizes) in MODELS.items():
        folder = root / f"models--{hub_id.replace('/', '--')}"
        if not (folder / "refs" / "main").exists():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
            model.save_pretrained(folder / "snapshots" / "made_here")
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / "main").write_text("made_here")
