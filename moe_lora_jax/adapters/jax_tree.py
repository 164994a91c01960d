"""The NNX parameter tree, paths joined with dots: just another layout.

A is [expert, rank, in] and B [expert, rank, out], so that both reshape without a copy into the two fused products.
"""

from moe_lora_interop.rules.dialect import Dialect
from moe_lora_interop.rules.tensors import Rule

JAX_TREE = Dialect(
    name="jax_tree",
    source="moe_lora_jax.layers.linear",
    rules=(
        Rule("lora_A", "{module}.lora_a", "expert rank in"),
        Rule("lora_B", "{module}.lora_b", "expert rank out"),
        Rule("router", "{module}.router.kernel", "in logit"),
        Rule("router_bias", "{module}.router.bias", "logit"),
        Rule("threshold", "{module}.router.threshold_kernel", "in"),
        Rule("threshold_bias", "{module}.router.threshold_bias", ""),
        Rule("temperature_{j}", "{module}.router.temperature.kernel_{j}", "in unit"),
        Rule("temperature_bias_{j}", "{module}.router.temperature.bias_{j}", "unit"),
        Rule("task_embedding", "{module}.router.task_embedding", "task dim"),
        Rule("router_{j}", "moe_lora_router.kernels.{j}", "in unit", module=""),
        Rule("router_bias_{j}", "moe_lora_router.biases.{j}", "unit", module=""),
        Rule("task_embedding", "moe_lora_router.task_embedding", "task dim", module=""),
    ),
    needs=frozenset({"lora_A", "lora_B"}),
)
