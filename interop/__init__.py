"""Mixture-of-LoRA checkpoints, framework-free: read, write, convert, inspect, verify. Imports neither jax nor torch."""

from interop.adapter import Adapter
from interop.checkpoint import detect, read, write
from interop.checks import Finding, Inspection, inspect, verify
from interop.combine import combine
from interop.config import MoeLoraConfig
from interop.conversion import convert
from interop.errors import CheckpointError, ConfigError

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = [
    "Adapter",
    "CheckpointError",
    "ConfigError",
    "Finding",
    "Inspection",
    "MoeLoraConfig",
    "combine",
    "convert",
    "detect",
    "inspect",
    "read",
    "verify",
    "write",
]
