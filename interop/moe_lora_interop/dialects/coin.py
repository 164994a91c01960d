"""CoIN (arXiv:2403.08350): MOELoRA's names for the experts, and a dense softmax router on every target layer."""

from moe_lora_interop.rules.codecs import TIMES_EXPERTS, renamed
from moe_lora_interop.rules.dialect import Dialect, Field
from moe_lora_interop.rules.lora_fields import INERT, TARGETS
from moe_lora_interop.rules.tensors import Rule

_PREFIX = "base_model.model.{module}"

COIN = Dialect(
    name="coin",
    source="zackschen/CoIN@4122465, CoIN/peft/tuners/coinmoelora.py",
    rules=(
        Rule("lora_A", f"{_PREFIX}.lora_A.loraA.{{expert}}.weight", "rank in"),
        Rule("lora_B", f"{_PREFIX}.lora_B.loraB.{{expert}}.weight", "out rank"),
        Rule("router", f"{_PREFIX}.lora_router.weight", "logit in"),
        # the same tensors under a second name; its trainers save them once
        Rule("lora_A", f"{_PREFIX}.lora_A.loraA.{{expert}}.mlp.weight", "rank in", copy="same"),
        Rule("lora_B", f"{_PREFIX}.lora_B.loraB.{{expert}}.mlp.weight", "out rank", copy="same"),
    ),
    fields=(
        Field("num_experts", "expert_num"),
        Field("r", "r", TIMES_EXPERTS),
        Field("lora_alpha", "lora_alpha", TIMES_EXPERTS),
        Field("lora_dropout", "lora_dropout", default=0.0),
        *TARGETS,
        Field("base_model_name_or_path", "base_model_name_or_path", default=None),
        Field("task_type", "task_type", renamed({"CAUSAL_LM_CoIN": "CAUSAL_LM"}), default=None),
    ),
    const={"peft_type": ("MOE_LORA_CoIN",), "bias": ("none",)},
    ignore=INERT | {"task_embedding_dim"},  # of MOELoRA, from which it comes; there are no tasks
    weights="adapter_model.bin",
    notes="dense softmax only; one E, r and alpha for all modules",
)
