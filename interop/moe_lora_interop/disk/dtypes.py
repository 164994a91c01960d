"""The dtypes of safetensors files: the names there, numpy's, and their width."""

import re

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy

NUMPY = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Those of an adapter or a base model: {name in a file: numpy's name}."""

STORED = {numpy: stored for stored, numpy in NUMPY.items()}


def bits(dtype: str) -> int:
    """Bits per value of any dtype in a file: F32, BF16, F8_E4M3, BOOL, ..."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8
