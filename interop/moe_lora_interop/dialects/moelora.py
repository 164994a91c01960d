"""MOELoRA (arXiv:2310.18339): one gate for the whole model, computed from a task embedding."""

from moe_lora_interop.rules.codecs import PLUS_ONE, TIMES_EXPERTS, renamed
from moe_lora_interop.rules.dialect import Dialect, Field
from moe_lora_interop.rules.lora_fields import INERT, TARGETS
from moe_lora_interop.rules.tensors import Rule

_PREFIX = "base_model.model.{module}"

MOELORA = Dialect(
    name="moelora",
    source="liuqidong07/MOELoRA-peft@2d9efa4e, src/MLoRA/peft/tuners/mmoeloraS.py",
    rules=(
        Rule("lora_A", f"{_PREFIX}.lora_A.loraA.{{expert}}.mlp.weight", "rank in"),
        Rule("lora_B", f"{_PREFIX}.lora_B.loraB.{{expert}}.mlp.weight", "out rank"),
        Rule("task_embedding", "lora_task_embedding.weight", "task dim", module=""),
        Rule("router_0", "lora_gate.GateL.weight", "unit in", module=""),
        # the same tensors under a second name, and per-layer gates that this forward never reads
        Rule("lora_A", f"{_PREFIX}.lora_A.loraA.{{expert}}.weight", "rank in", copy="same"),
        Rule("lora_B", f"{_PREFIX}.lora_B.loraB.{{expert}}.weight", "out rank", copy="same"),
        Rule("task_embedding", f"{_PREFIX}.lora_task_embedding.weight", "task dim", copy="dead"),
        Rule("router", f"{_PREFIX}.lora_gate.GateL.weight", "unit in", canonical_axes="unit in", copy="dead"),
    ),
    needs=frozenset({"lora_A", "lora_B", "task_embedding", "router_0"}),
    fields=(
        Field("num_experts", "expert_num"),
        Field("r", "r", TIMES_EXPERTS),
        Field("lora_alpha", "lora_alpha", TIMES_EXPERTS),
        Field("lora_dropout", "lora_dropout", default=0.0),
        Field("num_tasks", "task_num", PLUS_ONE),
        Field("task_embedding_dim", "task_embedding_dim"),
        *TARGETS,
        Field("base_model_name_or_path", "base_model_name_or_path", default=None),
        Field("task_type", "task_type", renamed({"CAUSAL_LMS": "CAUSAL_LM"}), default=None),
    ),
    fixed={"scope": "model", "router_input": "task"},
    const={"peft_type": ("MMOELORAS",), "bias": ("none",)},
    ignore=INERT,
    weights="adapter_model.bin",
    notes="dense softmax over experts of a task embedding; one E, r and alpha; task names are not stored",
)
