"""MaxText's LoRA tree with scanned layers, paths joined with dots: one stacked tensor for all layers of a projection.

Tensors only: MaxText keeps them in an Orbax checkpoint. `decode(MAXTEXT.rules, tensors, sizes)` and `encode` move them;
to encode, `sizes` must also give "head", the number of heads of the module, which no config of an adapter knows.
"""

from moe_lora_interop.rules.dialect import Dialect
from moe_lora_interop.rules.tensors import Rule

_KEY, _MODULE = "decoder.layers.self_attention", "model.layers.{layer}.self_attn"

MAXTEXT = Dialect(
    name="maxtext",
    source="AI-Hypercomputer/maxtext, utils/lora_utils.py: get_lora_abstract_state",
    rules=(
        *(
            rule
            for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
            for rule in (
                Rule("lora_A", f"{_KEY}.{theirs}.lora_a.kernel", "in layer rank", f"{_MODULE}.{ours}"),
                Rule(
                    "lora_B",
                    f"{_KEY}.{theirs}.lora_b.kernel",
                    "rank layer head dim",
                    f"{_MODULE}.{ours}",
                    "expert (head dim) rank",
                ),
            )
        ),
        Rule(
            "lora_A",
            f"{_KEY}.out.lora_a.kernel",
            "head layer dim rank",
            f"{_MODULE}.o_proj",
            "expert rank (head dim)",
        ),
        Rule("lora_B", f"{_KEY}.out.lora_b.kernel", "rank layer out", f"{_MODULE}.o_proj"),
    ),
    needs=frozenset({"lora_A", "lora_B"}),
    fixed={"num_experts": 1},
    config_file=False,
    notes="one expert on attention projections, every layer or none. Values are not changed: MaxText's conversion of a "
    "base model divides the query by sqrt(head_dim) and reorders heads for Llama 3.1; B of such a query differs alike",
)
