"""Every known checkpoint layout, one table per file."""

from interop.dialects.jax_tree import JAX_TREE
from interop.dialects.native import NATIVE

__all__ = ["JAX_TREE", "NATIVE"]
