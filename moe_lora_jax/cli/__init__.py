"""The verbs of `moe-lora` that need jax."""
