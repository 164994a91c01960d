"""`python -m moe_lora_jax.models`: the base models that `load_base_model` reads."""

from moe_lora_jax.models.support import support_table

print(support_table())
