"""MoLoRA of for-ai (arXiv:2309.05444): a T5X parameter tree exported to .npz or safetensors, names joined with "/"."""

from moe_lora_interop.rules.dialect import Dialect, Option
from moe_lora_interop.rules.tensors import Rule

FOR_AI_MOLORA = Dialect(
    name="for-ai-molora",
    source="for-ai/parameter-efficient-moe, src/molora.py and src/routing.py",
    rules=(
        Rule("lora_A", "{module}/lora_A", "expert in rank"),
        Rule("lora_B", "{module}/lora_B", "expert rank out"),
        Rule("router", "{module}/router/router_weights/v/kernel", "in logit"),
        Rule("router_bias", "{module}/router/router_weights/v/bias", "logit"),
    ),
    # alpha is an unannotated class attribute there, so no configuration can change it
    fixed={"lora_alpha": 16},
    options=(
        Option("r", "rank of one expert"),
        Option("num_experts", "number of experts"),
        Option("router_bias", "whether the routers have a bias", default=False),
        Option("top_k", "experts kept per token; null for dense routing", default=None),
        Option("norm_topk_prob", "whether kept weights are divided by their sum; theirs are not", default=True),
    ),
    weights="adapter_model.safetensors",
    config_file=False,
    notes="tensors only, no config file; softmax, dense or top-k without renormalisation; alpha is always 16",
)
