"""From a local Hugging Face directory to a `CausalLM`. Strict: every tensor is used, checked, or the load fails."""

import os
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from moe_lora_interop.disk.dtypes import NUMPY
from moe_lora_interop.disk.files import read_json
from moe_lora_interop.disk.hub import model_directory
from moe_lora_interop.disk.model_directory import WeightFiles
from moe_lora_interop.errors import CheckpointError
from moe_lora_jax.models.abstract import INERT, abstract_model, checked_dtype, stored_dtype
from moe_lora_jax.models.attending import Form
from moe_lora_jax.models.causal_lm import CausalLM
from moe_lora_jax.models.config import DecoderConfig
from moe_lora_jax.models.remat import Remat
from moe_lora_jax.sharding import RULES, Rules, read_sharded

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_base_model(
    directory: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: Any = None,
    scan_layers: bool = False,
    remat: Remat | None = None,
    attention: Form = "auto",
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> CausalLM:
    """Read config.json and model.safetensors (or the shards of model.safetensors.index.json).

    Tensors are read one at a time from memory-mapped files, so the peak is the model plus one tensor. No random
    weights are made. Ids that end a text or pad come from generation_config.json where it states them.

    On a mesh, every process reads only what its devices hold; `apply_moe_lora`, `load_adapter`, `train` and `generate`
    then work on that mesh (`moe_lora_jax.sharding`).

    Args:
        directory: what `save_pretrained` of transformers wrote, for a supported architecture; or the id of such a model
            on the Hugging Face Hub, "owner/name", of which what is needed is loaded into the Hub's cache (extra `hub`).
        revision: branch, tag or commit of an id.
        dtype: "float32", "bfloat16", "float16" or the same as a dtype; None keeps the stored one.
        scan_layers: run the layers as one scan, for a train step whose program does not grow with their number.
            Training then holds a second copy of the layers' weights. Passes with a KV cache (generation) still loop.
        remat: what of a layer is kept for the backward pass, which computes the rest again: "none" computes nothing
            again, "full" keeps the layer's input alone, "minimal" all its products too; `models.remat` has more. None:
            "full" with `scan_layers`, else "none". Saves memory on the CPU only together with `scan_layers`. None of
            these switches changes values, names or files.
        attention: "auto" takes splash (a Pallas kernel) on TPUs and cuDNN on GPUs; elsewhere, and for what these
            cannot do (one line through `logging` says it), "plain", or for long rows "chunked", whose memory grows with
            the row and not with its square. Each of these words asks for that form.
        mesh: devices to spread the weights over, with some of the axes "data", "fsdp", "tensor" and "expert".
        rules: which axis of which weight goes where.

    Raises:
        CheckpointError: not a model directory, unreadable files, or tensors that are missing, unexpected, of the
            wrong shape or of an unsupported dtype; all of them in one error.
        ConfigError: the architecture or fields of config.json are not supported, by name; or the mesh does not divide
            weights, by name.
        ValueError: an unsupported `dtype`, `remat` or `attention`.
    """
    wanted = checked_dtype(dtype)
    directory = model_directory(directory, revision)
    if not directory.is_dir():
        raise CheckpointError(f"cannot load {directory}", ["found no directory, expected a local one"])
    stated = read_json(directory / "config.json")
    if (directory / "generation_config.json").is_file():
        generation = read_json(directory / "generation_config.json")
        ids = {name: generation.get(name) for name in ("eos_token_id", "pad_token_id")}
        stated |= {name: value for name, value in ids.items() if value is not None}
    config = DecoderConfig.from_hf(stated, name_or_path=str(directory))

    with WeightFiles(directory) as files:
        config = replace(config, dtype=wanted or stored_dtype(files, stated))
        shapes = abstract_model(
            config, scan_layers=scan_layers, remat=remat, attention=attention, mesh=mesh, rules=rules
        )
        graphdef, state = nnx.split(shapes)
        parameters = nnx.to_flat_state(state)
        names = {path: _stored_name(path) for path, _ in parameters}
        _check(files, {names[path]: _stored_shape(path, variable) for path, variable in parameters}, config)
        filled = [(path, variable.replace(_read(files, path, variable.get_value()))) for path, variable in parameters]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _stored_name(path: tuple[Any, ...]) -> str:
    """NNX path -> key in the file: only the leaf is called differently."""
    leaf = {"kernel": "weight", "embedding": "weight"}.get(path[-1], path[-1])
    return ".".join(str(part) for part in (*path[:-1], leaf))


def _stored_shape(path: tuple[Any, ...], variable: nnx.Variable) -> tuple[int, ...]:
    """Linear weights are stored [out, in] and used [in, out]."""
    return variable.shape[::-1] if path[-1] == "kernel" else variable.shape


def _read(files: WeightFiles, path: tuple[Any, ...], wanted: jax.ShapeDtypeStruct) -> jax.Array:
    name, is_kernel = _stored_name(path), path[-1] == "kernel"

    def part(index: tuple[slice, ...]) -> np.ndarray:
        stored = files.read_part(name, index[::-1] if is_kernel else index)
        return np.array(stored.T if is_kernel else stored, wanted.dtype, order="C")

    if isinstance(wanted.sharding, NamedSharding):
        return read_sharded(wanted.shape, wanted.sharding, part)
    stored = files.read(name)
    # Always a copy: safetensors may return memory of the mapped file, and the model must not change when somebody
    # overwrites the file. JAX transposes while copying, faster than numpy does.
    return jnp.array((stored.T if is_kernel else stored).astype(wanted.dtype, copy=False), copy=True)


def _check(files: WeightFiles, expected: dict[str, tuple[int, ...]], config: DecoderConfig) -> None:
    """Compare names, shapes and dtypes with what the config implies, from the headers alone."""
    problems = [f"{key}: missing, expected shape {shape}" for key, shape in expected.items() if key not in files.infos]
    for key, (dtype, shape) in files.infos.items():
        if key in expected and shape != expected[key]:
            problems.append(f"{key}: found shape {shape}, expected {expected[key]}")
        if key in expected and dtype not in NUMPY:
            problems.append(f"{key}: found {dtype}, expected one of {', '.join(NUMPY)}")
        if key in expected or INERT.fullmatch(key):
            continue
        if key != _HEAD or _EMBEDDING not in files.infos:
            problems.append(f"{key}: unexpected tensor of shape {shape}")
        elif not np.array_equal(files.read(_HEAD), files.read(_EMBEDDING)):
            problems.append(
                f"{_HEAD}: found other values, expected those of {_EMBEDDING}: config.json says tie_word_embeddings"
            )
    if problems:
        raise CheckpointError(f"the weights in {files.directory} are not those of this {config.architecture}", problems)
