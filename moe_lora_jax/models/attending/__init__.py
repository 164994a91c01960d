"""`softmax(q k^T) v` in several forms, which compute the same: a file each, and the choice between them."""

from moe_lora_jax.models.attending.choice import FORMS, Attend, check_attention, choose

__all__ = ["FORMS", "Attend", "check_attention", "choose"]
