"""A directory and the adapter in it: detect, read, write, convert, inspect, verify, and the model card."""

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.checkpoint.detection import detect
from moe_lora_interop.checkpoint.inspection import Finding, Inspection, inspect, verify
from moe_lora_interop.checkpoint.read_write import convert, opened, read, write

__all__ = ["Adapter", "Finding", "Inspection", "convert", "detect", "inspect", "opened", "read", "verify", "write"]
