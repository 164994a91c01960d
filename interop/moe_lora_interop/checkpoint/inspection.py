"""Looking at a checkpoint: `inspect` reads headers only, `verify` reads everything and lists what is wrong."""

import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.checkpoint.base_tensors import base_problems, left_out
from moe_lora_interop.checkpoint.read_write import between_saves, opened
from moe_lora_interop.checkpoint.reading import OpenAdapter, Reading
from moe_lora_interop.checkpoint.servable import VllmNeeds, vllm_needs
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.in_words import routing_in_words
from moe_lora_interop.disk import files
from moe_lora_interop.disk.digest import NAME as DIGEST
from moe_lora_interop.disk.dtypes import bits
from moe_lora_interop.disk.files import TensorInfo
from moe_lora_interop.disk.model_directory import WeightFiles
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_interop.rules.base_tensors import name_in_base
from moe_lora_interop.rules.tensors import claim


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint says about itself.

    Attributes:
        layout: the layout's name.
        config: the adapter's config.
        routing: the routing rule in words.
        tensors: {stored name: dtype and shape}.
        parameters: number of values in all tensors.
        bytes: size of all tensors, in bytes.
        metadata: of the safetensors header.
        notes: what else the file holds: tensors of the base model, whole modules.
        vllm: what vLLM needs to serve the directory, or why it cannot.
    """

    layout: str
    config: MoeLoraConfig
    routing: str
    tensors: dict[str, TensorInfo]
    parameters: int
    bytes: int
    metadata: dict[str, str]
    notes: list[str]
    vllm: VllmNeeds

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        tensors = {name: {"dtype": t.dtype, "shape": list(t.shape)} for name, t in self.tensors.items()}
        needs = dict(self.vllm.__dict__)
        return {**self.__dict__, "config": self.config.to_dict(), "tensors": tensors, "vllm": needs}


@dataclass(frozen=True)
class Finding:
    """One thing that `verify` noticed: `level` is "error" (do not use it) or "note"."""

    level: str
    message: str


def inspect(directory: str | os.PathLike[str], layout: str | None = None, **options: Any) -> Inspection:
    """Describes a checkpoint from its config and its header, without reading a tensor or checking the digest.

    Args:
        directory: the checkpoint, in any layout (a .bin or .npz file has no header and is read).
        layout: the layout's name; None detects it.
        options: what the layout does not record, as for `read`.

    Raises:
        CheckpointError, ConfigError: it is not a checkpoint in a known layout.
    """
    with between_saves(directory, layout, options, _inspection) as found:
        return found


def _inspection(reading: Reading) -> Inspection:
    config, tensors = reading.adapter_config(), reading.stored.infos
    counts = {name: math.prod(t.shape) for name, t in tensors.items()}
    return Inspection(
        reading.dialect.name,
        config,
        routing_in_words(config),
        tensors,
        parameters=sum(counts.values()),
        bytes=sum(counts[name] * bits(t.dtype) // 8 for name, t in tensors.items()),
        metadata=dict(reading.stored.metadata),
        notes=reading.notes(),
        vllm=vllm_needs(reading.dialect.name, config, sorted({*_modules(reading)})),
    )


def _modules(reading: Reading) -> Iterator[str]:
    """The modules that the adapter changes, by the names of its tensors; with names of their own in some layouts."""
    for name, info in reading.stored.infos.items():
        rule = claim(reading.dialect.rules, name, len(info.shape))
        if rule is not None and rule.role == "lora_B" and (bound := rule.stored.bind(name)) is not None:
            yield bound.get("module", name)


def verify(directory: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> list[Finding]:
    """Reads a checkpoint completely and returns what was noticed; no finding of level "error" means it is sound.

    Args:
        directory: the checkpoint.
        base: a Hugging Face model directory; its tensor names and shapes are compared with the adapter's.
    """
    try:
        with opened(directory) as adapter:
            findings = [*_metadata_findings(adapter), *_value_findings(adapter)]
            if base is None:
                return [*findings, *(Finding("note", text) for text in left_out(adapter.base_tensors))]
            return [*findings, *_base_findings(adapter, Path(base))]
    except (CheckpointError, ConfigError) as error:
        return [Finding("error", f"{error.what}: {problem}") for problem in error.problems] or [
            Finding("error", error.what)
        ]


def _metadata_findings(adapter: OpenAdapter) -> Iterator[Finding]:
    metadata, expected = adapter.metadata, adapter.dialect.header(adapter.config.to_dict())
    if DIGEST not in metadata:
        yield Finding("note", "no digest in the file (PEFT writes none): damage to the tensors would not be noticed")
    for key in sorted(metadata.keys() - expected.keys() - {DIGEST}):
        yield Finding("note", f"unknown header metadata {key!r}: {metadata[key]!r}")
    version = expected.get("format_version")
    if version is not None and (found := metadata.get("format_version", version)) != version:
        yield Finding("error", f"header format_version: found {found!r}, expected {version!r}")


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
    for problem in layer_problems(adapter.features, base_shapes(base), base):
        yield Finding("error", problem)
    of_base = _of_base(adapter, base)
    for name in adapter.base_tensors.keys() - of_base.keys():
        yield Finding("error", f"{name_in_base(name)}: came with the adapter, not in the base model at {base}")
    for problem in base_problems(adapter.base_tensors, of_base):
        yield Finding("error", problem)


def layer_problems(
    features: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, ...]], base: Path
) -> Iterator[str]:
    """Which modules, {path: (in, out)}, are not layers of the base model at `base`, whose tensors have these shapes."""
    for module, sizes in features.items():
        found, expected = sizes[::-1], shapes.get(_stored_name(f"{module}.weight", shapes) or "")
        if expected is None:
            yield f"{module}: not in the base model at {base}"
        elif found != expected:
            yield f"{module}: the adapter is for [out, in] = {list(found)}, the base has {list(expected)}"


def _of_base(adapter: Adapter, base: Path) -> dict[str, np.ndarray]:
    """The base's own tensors for those that came with the adapter."""
    if not adapter.base_tensors:
        return {}
    with WeightFiles(base) as weights:
        names = {name: _stored_name(name_in_base(name), weights.infos) for name in adapter.base_tensors}
        return {name: weights.read(stored) for name, stored in names.items() if stored is not None}


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
