"""The program `moe-lora`, and the verbs that need neither jax nor torch."""
