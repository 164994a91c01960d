"""CoMoL (ACL 2026): one A and one B, and E small cores between them, which a dense softmax router mixes."""

from moe_lora_interop.rules.derived import cores_into_b
from moe_lora_interop.rules.dialect import Dialect, Field
from moe_lora_interop.rules.lora_fields import INERT, LORA
from moe_lora_interop.rules.tensors import Rule

_PREFIX = "base_model.model.{module}"

COMOL = Dialect(
    name="comol",
    source="DCDmllm/CoMoL@b9aac3d, src",
    rules=(
        Rule("lora_A", f"{_PREFIX}.lora_A.weight", "rank in"),
        Rule("lora_B", f"{_PREFIX}.lora_B.weight", "out rank"),
        Rule("core", f"{_PREFIX}.lora_Cores.{{expert}}", "rank code"),
        Rule("router", f"{_PREFIX}.lora_router.weight", "logit in"),
    ),
    needs=frozenset({"lora_A", "lora_B", "core", "router"}),
    fields=(Field("num_experts", "num_experts"), Field("r", "lora_rank"), *LORA),
    fixed={"shared_lora_A": True},
    const={"peft_type": ("MoCoreLORA",), "bias": ("none",), "core_router": (False, True)},
    ignore=INERT,
    weights="adapter_model.bin",
    derive=cores_into_b,
    read_only="expert e becomes B C_e^T beside one A, as in HydraLoRA; such experts have no cores",
    notes="dense softmax and one shared A, as HydraLoRA; the same function in evaluation, other parameters in training",
)
