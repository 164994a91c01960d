"""Tests for what others add: whether a routing of one's own keeps its contract, and its functions agree."""

from moe_lora_interop.testing.routing_parity import check_routing

__all__ = ["check_routing"]
