"""A checksum over config and tensors, so that a damaged or hand-mixed checkpoint is noticed. Not a signature.

xxh3-128 of the config without bookkeeping fields, the metadata, and all tensors: name, dtype, shape, then the bytes in
the order of the names. The two halves are apart because the bytes pass by only once, while a file is read or written.
"""

import json
from collections.abc import Mapping

import numpy as np
from xxhash import xxh3_128

from interop import lazy
from interop.config import MoeLoraConfig

NAME = "digest"


def begun(config: MoeLoraConfig, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> xxh3_128:
    """The state before the tensors' bytes."""
    described = {
        "config": config.semantic_dict(),
        "metadata": {k: v for k, v in metadata.items() if k != NAME},
        "tensors": [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)],
    }
    return xxh3_128(json.dumps(described, sort_keys=True).encode())


def text(state: xxh3_128) -> str:
    """As it stands in a file: of the same length for any state."""
    return f"xxh3-128:{state.hexdigest()}"


def digest(config: MoeLoraConfig, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """The digest of a whole adapter, one tensor in memory at a time."""
    state = begun(config, tensors, metadata)
    for name in sorted(tensors):
        state.update(lazy.raw(tensors[name]))
    return text(state)
