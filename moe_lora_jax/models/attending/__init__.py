"""`softmax(q k^T) v` in several forms, which compute the same: a file each, and the choice between them."""

from moe_lora_jax.models.attending.choice import Attend, Form, check_attention, choose

__all__ = ["Attend", "Form", "check_attention", "choose"]
