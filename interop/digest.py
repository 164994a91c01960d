"""A checksum over config and tensors, so that a damaged or hand-mixed checkpoint is noticed. Not a signature."""

import json
from collections.abc import Mapping

import numpy as np
import xxhash

from interop.config import MoeLoraConfig

NAME = "digest"


def digest(config: MoeLoraConfig, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """xxh3-128 of the config without bookkeeping fields, the metadata, and all tensors: name, dtype, shape, bytes."""
    state = xxhash.xxh3_128()
    described = {
        "config": config.semantic_dict(),
        "metadata": {k: v for k, v in metadata.items() if k != NAME},
        "tensors": [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)],
    }
    state.update(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        state.update(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
    return f"xxh3-128:{state.hexdigest()}"
