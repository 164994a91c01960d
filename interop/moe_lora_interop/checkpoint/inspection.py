"""Looking at a checkpoint: `inspect` reads headers only, `verify` reads everything and lists what is wrong."""

import math
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_lora_interop.checkpoint import directory as storage
from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.checkpoint.base_tensors import base_problems, left_out
from moe_lora_interop.checkpoint.read_write import METADATA, layout_of, opened
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.in_words import routing_in_words
from moe_lora_interop.dialects.registry import dialect_named
from moe_lora_interop.disk import files
from moe_lora_interop.disk.digest import NAME as DIGEST
from moe_lora_interop.disk.files import TensorInfo
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_interop.rules.base_tensors import base_tensors, name_in_base, whole_modules

METADATA_KEYS = {*METADATA, DIGEST}


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint says about itself.

    Attributes:
        dialect: the layout's name.
        config: the adapter's config.
        routing: the routing rule in words.
        tensors: {stored name: dtype and shape}.
        parameters: number of values in all tensors.
        bytes: size of all tensors, in bytes.
        metadata: of the safetensors header.
        notes: what else the file holds: tensors of the base model, whole modules.
    """

    dialect: str
    config: MoeLoraConfig
    routing: str
    tensors: dict[str, TensorInfo]
    parameters: int
    bytes: int
    metadata: dict[str, str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        tensors = {name: {"dtype": t.dtype, "shape": list(t.shape)} for name, t in self.tensors.items()}
        return {**self.__dict__, "config": self.config.to_dict(), "tensors": tensors}


@dataclass(frozen=True)
class Finding:
    """One thing that `verify` noticed: `level` is "error" (do not use it) or "note"."""

    level: str
    message: str


def inspect(directory: str | os.PathLike[str], dialect: str | None = None, **options: Any) -> Inspection:
    """Describes a checkpoint from its config and its header, without reading a tensor or checking the digest.

    Args:
        directory: the checkpoint, in any layout (a .bin or .npz file has no header and is read).
        dialect: the layout's name; None detects it.
        options: what the layout does not record, as for `read`.

    Raises:
        CheckpointError, ConfigError: it is not a checkpoint in a known layout.
    """
    path = files.existing_directory(directory)
    name = dialect or layout_of(path)
    stored = storage.open_directory(path, dialect_named(name), options)
    if name == "native":
        config = MoeLoraConfig.from_dict(stored.raw)
    else:
        with opened(path, name, **options) as adapter:
            config = adapter.config
    tensors, metadata = stored.infos, stored.metadata
    counts = {name: math.prod(t.shape) for name, t in tensors.items()}
    size = sum(counts[name] * bits(t.dtype) // 8 for name, t in tensors.items())
    notes = list(_notes(name, config, tensors))
    return Inspection(name, config, routing_in_words(config), tensors, sum(counts.values()), size, metadata, notes)


def _notes(dialect: str, config: MoeLoraConfig, infos: dict[str, TensorInfo]) -> Iterator[str]:
    whole = whole_modules(config.modules_to_save or (), infos)
    shapes = {name: np.broadcast_to(np.float32(0), info.shape) for name, info in infos.items() if name not in whole}
    yield from left_out(base_tensors(dialect_named(dialect).rules, shapes))
    yield from (f"{name}: trained as a whole (modules_to_save); only PyTorch can use it" for name in whole)


def bits(dtype: str) -> int:
    """Bits per value of a safetensors dtype: F32, BF16, F8_E4M3, BOOL, ..."""
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8


def verify(directory: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> list[Finding]:
    """Reads a checkpoint completely and returns what was noticed; no finding of level "error" means it is sound.

    Args:
        directory: the checkpoint.
        base: a Hugging Face model directory; its tensor names and shapes are compared with the adapter's.
    """
    try:
        with opened(directory) as adapter:
            path = Path(directory)
            metadata = storage.open_directory(path, dialect_named(layout_of(path)), {}).metadata
            findings = [*_metadata_findings(metadata), *_value_findings(adapter)]
            if base is None:
                return [*findings, *(Finding("note", text) for text in left_out(adapter.base_tensors))]
            return [*findings, *_base_findings(adapter, Path(base))]
    except (CheckpointError, ConfigError) as error:
        return [Finding("error", f"{error.what}: {problem}") for problem in error.problems] or [
            Finding("error", error.what)
        ]


def _metadata_findings(metadata: dict[str, str]) -> Iterator[Finding]:
    if DIGEST not in metadata:
        yield Finding("note", "no digest in the file (PEFT writes none): damage to the tensors would not be noticed")
    for key in sorted(metadata.keys() - METADATA_KEYS):
        yield Finding("note", f"unknown header metadata {key!r}: {metadata[key]!r}")
    version = metadata.get("format_version", METADATA["format_version"])
    if version != METADATA["format_version"]:
        yield Finding("error", f"header format_version: found {version!r}, expected {METADATA['format_version']!r}")


def _value_findings(adapter: Adapter) -> Iterator[Finding]:
    is_zero = True
    for (module, role), lazy in sorted(adapter.tensors.items()):
        tensor = np.asarray(lazy)
        is_zero &= role != "lora_B" or not tensor.tobytes().strip(b"\0")
        with np.errstate(invalid="ignore"):  # a signalling NaN, which is what is looked for
            bad = tensor.size - int(np.isfinite(tensor.astype(np.float32)).sum())
        if bad:
            yield Finding("error", f"{module} {role}: {bad} of {tensor.size} values are NaN or infinite")
    if is_zero:
        yield Finding("note", "every lora_B is zero: the adapter does nothing yet")


def _base_findings(adapter: Adapter, base: Path) -> Iterator[Finding]:
    shapes = base_shapes(base)
    for module in adapter.modules:
        found = (adapter.tensors[module, "lora_B"].shape[1], adapter.tensors[module, "lora_A"].shape[-1])
        expected = shapes.get(_stored_name(f"{module}.weight", shapes) or "")
        if expected is None:
            yield Finding("error", f"{module}: not in the base model at {base}")
        elif found != expected:
            yield Finding(
                "error", f"{module}: the adapter is for [out, in] = {list(found)}, the base has {list(expected)}"
            )
    of_base = _of_base(adapter, base)
    for name in adapter.base_tensors.keys() - of_base.keys():
        yield Finding("error", f"{name_in_base(name)}: came with the adapter, not in the base model at {base}")
    for problem in base_problems(adapter.base_tensors, of_base):
        yield Finding("error", problem)


def _of_base(adapter: Adapter, base: Path) -> dict[str, np.ndarray]:
    """The base's own tensors for those that came with the adapter."""
    places = {name: path for path in sorted(base.glob("*.safetensors")) for name in files.read_header(path)[0]}
    found = {}
    for name in adapter.base_tensors:
        if (stored := _stored_name(name_in_base(name), places)) is not None:
            with files.open_tensors(places[stored]) as tensors:
                found[name] = np.asarray(tensors[stored])
    return found


def _stored_name(name: str, stored: Collection[str]) -> str | None:
    """What a tensor is called in the base's files: a head that is not stored is the embeddings (tied)."""
    embeddings = [n for n in stored if n.endswith("embed_tokens.weight")]
    if name not in stored and name == "lm_head.weight" and len(embeddings) == 1:
        return embeddings[0]
    return name if name in stored else None


def base_shapes(base: Path) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} of a Hugging Face model directory, from headers only."""
    paths = sorted(files.existing_directory(base).glob("*.safetensors"))
    if not paths:
        raise CheckpointError("not a base model", [f"{base}: no *.safetensors file"])
    headers = [files.read_header(path)[0] for path in paths]
    return {name: info.shape for header in headers for name, info in header.items()}
