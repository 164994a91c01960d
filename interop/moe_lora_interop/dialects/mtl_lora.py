"""MTL-LoRA (arXiv:2410.09437) and the MOELoRA beside it: tensors in a torch file, routed by task on every layer."""

from moe_lora_interop.rules.codecs import TIMES_EXPERTS
from moe_lora_interop.rules.derived import gates_into_table, task_matrices_into_b
from moe_lora_interop.rules.dialect import Dialect, Option
from moe_lora_interop.rules.tensors import Rule

_FILE = "checkpoint/final_checkpoint.pt"
_BIAS = "its program gives every target layer a random bias and saves none; here there is none"
_SOURCE = "pUmpKin-Co/MTL-LoRA@7848a70, src"

MTL_LORA = Dialect(
    name="mtl-lora",
    source=_SOURCE,
    rules=(
        Rule("lora_A", "{module}.lora_A", "expert rank in"),
        Rule("up", "{module}.lora_B", "unit out rank"),
        Rule("up_logits", "{module}.lora_B_w", "task unit"),
        Rule("task_matrix", "{module}.lora_lambdas", "task rank code"),
        Rule("task_diagonal", "{module}.lora_lambdas", "task rank"),
    ),
    needs=frozenset({"lora_A", "up", "up_logits"}),
    fixed={"shared_lora_A": True, "router_input": "task", "router_depth": 0},
    counted={"r": ("lora_A", 1), "num_tasks": ("task_embedding", 0)},
    options=(
        Option("lora_alpha", "numerator of the scaling lora_alpha / r"),
        Option("temperature", "divides the logits of the up matrices: B_scale on its command line"),
    ),
    experts_from_tensors=True,
    weights=_FILE,
    config_file=False,
    derive=task_matrices_into_b,
    read_only="expert t becomes what task t computes, (sum_j w_tj B_j) Lambda_t beside one A; it has no such factors",
    notes=f"one expert for each task; {_BIAS}",
)

MTL_MOELORA = Dialect(
    name="mtl-moelora",
    source=_SOURCE,
    rules=(
        Rule("lora_A", "{module}.lora_A.loraA.{expert}.weight", "rank in"),
        Rule("lora_B", "{module}.lora_B.loraB.{expert}.weight", "out rank"),
        Rule("task_embedding", "{module}.lora_task_embedding.weight", "task dim"),
        Rule("router", "{module}.lora_gate.GateL.weight", "logit in"),
        Rule("lora_A", "{module}.lora_A.loraA.{expert}.mlp.weight", "rank in", copy="same"),
        Rule("lora_B", "{module}.lora_B.loraB.{expert}.mlp.weight", "out rank", copy="same"),
    ),
    needs=frozenset({"lora_A", "lora_B", "task_embedding", "router"}),
    fixed={"router_input": "task", "router_depth": 0},
    counted={"r": ("lora_A", 1), "num_tasks": ("task_embedding", 0)},
    options=(Option("lora_alpha", "numerator of the scaling lora_alpha / (r of all experts together)", TIMES_EXPERTS),),
    experts_from_tensors=True,
    weights=_FILE,
    config_file=False,
    derive=gates_into_table,
    read_only="a task's logits are stored, not the embedding and the gate that they are the product of",
    notes=f"dense softmax by task; {_BIAS}",
)
