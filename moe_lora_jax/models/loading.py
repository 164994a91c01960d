"""From a local Hugging Face directory to a `CausalLM`. Strict: every tensor is used, checked, or the load fails."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from moe_lora_interop.disk.dtypes import NUMPY, STORED
from moe_lora_interop.disk.files import read_json
from moe_lora_interop.disk.model_directory import WeightFiles
from moe_lora_interop.errors import CheckpointError
from moe_lora_jax.models.causal_lm import CausalLM
from moe_lora_jax.models.config import DecoderConfig
from moe_lora_jax.models.repeat import check_remat
from moe_lora_jax.sharding import RULES, Rules, automatic, read_sharded, shardings

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Written by old transformers; recomputed from the config.
_INERT = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def load_base_model(
    directory: str | os.PathLike[str],
    *,
    dtype: Any = None,
    scan_layers: bool = False,
    remat: bool | str = False,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> CausalLM:
    """Read config.json and model.safetensors (or the shards of model.safetensors.index.json).

    Tensors are read one at a time from memory-mapped files, so the peak is the model plus one tensor. No random
    weights are made. Ids that end a text or pad come from generation_config.json where it states them.

    On a mesh, every process reads only what its devices hold; `apply_moe_lora`, `load_adapter`, `train` and `generate`
    then work on that mesh (`moe_lora_jax.sharding`).

    Args:
        directory: what `save_pretrained` of transformers wrote, for a supported architecture.
        dtype: "float32", "bfloat16", "float16" or the same as a dtype; None keeps the stored one.
        scan_layers: run the layers as one scan, for a train step whose program does not grow with their number.
            Training then holds a second copy of the layers' weights. Passes with a KV cache (generation) still loop.
        remat: recompute each layer in the backward pass: True, or a name of `models.repeat.POLICIES`. Saves memory on
            the CPU only together with `scan_layers`. Neither switch changes values, names or files.
        mesh: devices to spread the weights over, with some of the axes "data", "fsdp", "tensor" and "expert".
        rules: which axis of which weight goes where.

    Raises:
        CheckpointError: not a model directory, unreadable files, or tensors that are missing, unexpected, of the
            wrong shape or of an unsupported dtype; all of them in one error.
        ConfigError: the architecture or fields of config.json are not supported, by name; or the mesh does not divide
            weights, by name.
        ValueError: an unsupported `dtype` or `remat`.
    """
    check_remat(remat)
    wanted = None if dtype is None else jnp.dtype(dtype).name
    if wanted is not None and wanted not in STORED:
        raise ValueError(f"dtype: found {dtype!r}, expected None or one of {', '.join(STORED)}")
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"cannot load {directory}", ["found no directory, expected a local one"])
    stated = read_json(directory / "config.json")
    if (directory / "generation_config.json").is_file():
        generation = read_json(directory / "generation_config.json")
        ids = {name: generation.get(name) for name in ("eos_token_id", "pad_token_id")}
        stated |= {name: value for name, value in ids.items() if value is not None}
    config = DecoderConfig.from_hf(stated, name_or_path=str(directory))

    with WeightFiles(directory) as files:
        config = replace(config, dtype=wanted or _stored_dtype(files, stated))
        abstract = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(abstract)
        parameters = nnx.to_flat_state(state)
        names = {path: _stored_name(path) for path, _ in parameters}
        _check(files, {names[path]: _stored_shape(path, variable) for path, variable in parameters}, config)
        where: dict[str, NamedSharding] = {}
        if mesh is not None:
            mesh = automatic(mesh)
            where = shardings({_dotted(path): variable.shape for path, variable in parameters}, mesh, rules)
        filled = [
            (path, variable.replace(_read(files, path, variable.shape, config.dtype, where.get(_dotted(path)))))
            for path, variable in parameters
        ]
    model = nnx.merge(graphdef, nnx.from_flat_state(filled))
    model.model.scan_layers, model.model.remat = scan_layers, remat
    model.model.mesh = mesh
    return model


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _stored_name(path: tuple[Any, ...]) -> str:
    """NNX path -> key in the file: only the leaf is called differently."""
    leaf = {"kernel": "weight", "embedding": "weight"}.get(path[-1], path[-1])
    return ".".join(str(part) for part in (*path[:-1], leaf))


def _stored_shape(path: tuple[Any, ...], variable: nnx.Variable) -> tuple[int, ...]:
    """Linear weights are stored [out, in] and used [in, out]."""
    return variable.shape[::-1] if path[-1] == "kernel" else variable.shape


def _read(
    files: WeightFiles, path: tuple[Any, ...], shape: tuple[int, ...], dtype: str, sharding: NamedSharding | None
) -> jax.Array:
    name, is_kernel = _stored_name(path), path[-1] == "kernel"

    def part(index: tuple[slice, ...]) -> np.ndarray:
        stored = files.read_part(name, index[::-1] if is_kernel else index)
        return np.array(stored.T if is_kernel else stored, dtype, order="C")

    if sharding is not None:
        return read_sharded(shape, sharding, part)
    stored = files.read(name)
    # Always a copy: safetensors may return memory of the mapped file, and the model must not change when somebody
    # overwrites the file. JAX transposes while copying, faster than numpy does.
    return jnp.array((stored.T if is_kernel else stored).astype(dtype, copy=False), copy=True)


def _stored_dtype(files: WeightFiles, stated: dict[str, Any]) -> str:
    """The dtype of the tensors; where they differ, config.json must say which is meant."""
    kinds = sorted({info.dtype for key, info in files.infos.items() if not _INERT.fullmatch(key)})
    if len(kinds) == 1:
        return NUMPY.get(kinds[0], "float32")  # an unsupported one is reported by _check, tensor by tensor
    declared = stated.get("dtype") or stated.get("torch_dtype")
    if declared is None:
        raise CheckpointError(
            f"cannot load {files.directory}",
            [f"tensors: found {', '.join(kinds)}, expected one dtype: choose one with dtype="],
        )
    return declared


def _check(files: WeightFiles, expected: dict[str, tuple[int, ...]], config: DecoderConfig) -> None:
    """Compare names, shapes and dtypes with what the config implies, from the headers alone."""
    problems = [f"{key}: missing, expected shape {shape}" for key, shape in expected.items() if key not in files.infos]
    for key, (dtype, shape) in files.infos.items():
        if key in expected and shape != expected[key]:
            problems.append(f"{key}: found shape {shape}, expected {expected[key]}")
        if key in expected and dtype not in NUMPY:
            problems.append(f"{key}: found {dtype}, expected one of {', '.join(NUMPY)}")
        if key in expected or _INERT.fullmatch(key):
            continue
        if key != _HEAD or _EMBEDDING not in files.infos:
            problems.append(f"{key}: unexpected tensor of shape {shape}")
        elif not np.array_equal(files.read(_HEAD), files.read(_EMBEDDING)):
            problems.append(
                f"{_HEAD}: found other values, expected those of {_EMBEDDING}: config.json says tie_word_embeddings"
            )
    if problems:
        raise CheckpointError(f"the weights in {files.directory} are not those of this {config.architecture}", problems)
