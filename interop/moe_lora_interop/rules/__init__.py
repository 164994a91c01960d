"""The engine that moves tensors and config fields between a layout and ours, both ways by one table."""

from moe_lora_interop.rules.dialect import Dialect, Field, Folders, Option
from moe_lora_interop.rules.tensors import AXES, ROLES, Rule, decode, encode

__all__ = ["AXES", "Dialect", "Field", "Folders", "Option", "ROLES", "Rule", "decode", "encode"]
