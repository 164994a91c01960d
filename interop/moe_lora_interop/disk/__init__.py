"""Bytes, strictly: safetensors, .npz and torch files, atomic saves, digests, limits. Knows nothing of adapters."""
