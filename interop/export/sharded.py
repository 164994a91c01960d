"""Writing a model tensor by tensor: the plan first, then one array in memory at a time."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from interop.files import TensorInfo

ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: its name, dtype and shape now, its values when it is its turn."""

    name: str
    info: TensorInfo
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.info.shape) * ITEMSIZE[self.info.dtype]


def shard_writers(plan: Sequence[Planned], max_bytes: int) -> dict[str, Callable[[Path], None]]:
    """{file name: function that writes it}: one file, or shards of at most `max_bytes` (or one tensor) and an index."""
    shards: list[list[Planned]] = [[]]
    for tensor in plan:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return {"model.safetensors": _writer(shards[0])}
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for t in plan)}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2) + "\n"
    writers = {name: _writer(shard) for name, shard in zip(names, shards, strict=True)}
    return {**writers, "model.safetensors.index.json": lambda path: path.write_text(text, "utf-8")}


def _writer(tensors: Sequence[Planned]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        ordered = sorted(tensors, key=lambda t: -ITEMSIZE[t.info.dtype])  # values stay aligned
        for tensor in ordered:
            start, end = end, end + tensor.nbytes
            header[tensor.name] = {"dtype": tensor.info.dtype, "shape": tensor.info.shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in ordered:
                array = tensor.make()
                assert (array.shape, array.nbytes) == (tensor.info.shape, tensor.nbytes), tensor.name
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    return write
