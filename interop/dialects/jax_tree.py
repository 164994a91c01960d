"""The NNX parameter tree, paths joined with dots: just another layout.

A is [expert, rank, in] and B [expert, rank, out], so that both reshape without a copy into the two fused products.
"""

from interop.rules import Dialect, Rule

JAX_TREE = Dialect(
    name="jax_tree",
    source="moe_lora_jax.layers",
    rules=(
        Rule("lora_A", "{module}.lora_a", "expert rank in"),
        Rule("lora_B", "{module}.lora_b", "expert rank out"),
        Rule("router", "{module}.router.kernel", "in expert"),
        Rule("router_bias", "{module}.router.bias", "expert"),
        Rule("threshold", "{module}.router.threshold_kernel", "in"),
        Rule("threshold_bias", "{module}.router.threshold_bias", ""),
    ),
)
