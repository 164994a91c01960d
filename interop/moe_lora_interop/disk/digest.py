"""A checksum over config and tensors, so that a damaged or hand-mixed checkpoint is noticed. Not a signature.

xxh3-128 of the config without bookkeeping fields, the metadata, and all tensors: name, dtype, shape, then the bytes in
the order of the names. The two halves are apart because the bytes pass by only once, while a file is read or written.
"""

import json
from collections.abc import Mapping
from typing import Any

from xxhash import xxh3_128

from moe_lora_interop.disk import lazy
from moe_lora_interop.disk.lazy import Tensor

NAME = "digest"


def begun(config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> xxh3_128:
    """The state before the tensors' bytes. `config` is without bookkeeping fields, in JSON's own types."""
    described = {
        "config": config,
        "metadata": {k: v for k, v in metadata.items() if k != NAME},
        "tensors": [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)],
    }
    return xxh3_128(json.dumps(described, sort_keys=True).encode())


def text(state: xxh3_128) -> str:
    """As it stands in a file: of the same length for any state."""
    return f"xxh3-128:{state.hexdigest()}"


def digest(config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The digest of a whole adapter, one tensor in memory at a time."""
    state = begun(config, tensors, metadata)
    for name in sorted(tensors):
        state.update(lazy.raw(tensors[name]))
    return text(state)
