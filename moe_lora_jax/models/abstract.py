"""A base model of shapes: what `load_base_model` would make, without a weight in memory."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moe_lora_interop.disk.dtypes import NUMPY, STORED
from moe_lora_interop.disk.files import read_json
from moe_lora_interop.disk.hub import config_directory
from moe_lora_interop.disk.model_directory import INDEX, SINGLE, WeightFiles
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_jax.models.attending import Form, check_attention
from moe_lora_jax.models.causal_lm import CausalLM
from moe_lora_jax.models.config import DecoderConfig
from moe_lora_jax.models.remat import Remat, checked
from moe_lora_jax.sharding import RULES, Rules, automatic, put, shardings

# Written by old transformers; recomputed from the config.
INERT = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def abstract_base_model(
    config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    dtype: Any = None,
    scan_layers: bool = False,
    remat: Remat | None = None,
    attention: Form = "auto",
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> CausalLM:
    """The model that `load_base_model` would read, with a `jax.ShapeDtypeStruct` in place of every array.

    `apply_moe_lora`, `split_model` and `make_train_step(...).lower` take it: a program can be compiled, for devices
    that are not there (`make_mesh(sizes, devices=...)`), and nothing is computed.

    Args:
        config: what config.json says, as a mapping or a file; or a model directory, with or without its weights; or an
            id on the Hugging Face Hub, of which only config.json is loaded.
        dtype: as in `load_base_model`; None takes that of the weights, or that which config.json states.

    Other arguments as in `load_base_model`.

    Raises:
        CheckpointError: no such file, or it cannot be read.
        ConfigError: the architecture or fields of config.json are not supported, by name; no dtype is stated or given;
            or the mesh does not divide weights, by name.
        ValueError: an unsupported `dtype`, `remat` or `attention`.
    """
    wanted = checked_dtype(dtype)
    if isinstance(config, Mapping):
        where, stated = None, dict(config)
    else:
        where = config_directory(config)
        stated = read_json(where / "config.json" if where.is_dir() else where)
    if wanted is None:
        wanted = _dtype(where, stated)
    decoder = replace(DecoderConfig.from_hf(stated, name_or_path=None if where is None else str(where)), dtype=wanted)
    return abstract_model(decoder, scan_layers=scan_layers, remat=remat, attention=attention, mesh=mesh, rules=rules)


def abstract_model(
    config: DecoderConfig,
    *,
    scan_layers: bool,
    remat: Remat | None,
    attention: Form,
    mesh: Mesh | None,
    rules: Rules,
) -> CausalLM:
    """The model of a config, in shapes that lie where the rules say; see `load_base_model` for the arguments."""
    policy = checked(remat, scan_layers=scan_layers)
    check_attention(attention)
    model = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
    model.model.scan_layers, model.model.remat, model.model.attention = scan_layers, policy, attention
    if mesh is None:
        return model
    model.model.mesh = automatic(mesh)
    graphdef, state = nnx.split(model)
    parameters = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    where = shardings({name: variable.shape for name, (_, variable) in parameters.items()}, model.model.mesh, rules)
    placed = [(path, v.replace(put(v.get_value(), where[name]))) for name, (path, v) in parameters.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(placed))


def checked_dtype(dtype: Any) -> str | None:
    """Its name; None stays None. Raises ValueError if weights cannot be stored in it."""
    wanted = None if dtype is None else jnp.dtype(dtype).name
    if wanted is not None and wanted not in STORED:
        raise ValueError(f"dtype: found {dtype!r}, expected None or one of {', '.join(STORED)}")
    return wanted


def stored_dtype(files: WeightFiles, stated: Mapping[str, Any]) -> str:
    """The dtype of the tensors; where they differ, config.json must say which is meant."""
    kinds = sorted({info.dtype for key, info in files.infos.items() if not INERT.fullmatch(key)})
    if len(kinds) == 1:
        return NUMPY.get(kinds[0], "float32")  # an unsupported one is reported tensor by tensor, when they are read
    declared = stated.get("dtype") or stated.get("torch_dtype")
    if declared is None:
        raise CheckpointError(
            f"cannot load {files.directory}",
            [f"tensors: found {', '.join(kinds)}, expected one dtype: choose one with dtype="],
        )
    return declared


def _dtype(where: Path | None, stated: Mapping[str, Any]) -> str:
    if where is not None and any((where / name).is_file() for name in (SINGLE, INDEX)):
        with WeightFiles(where) as files:
            return stored_dtype(files, stated)
    declared = stated.get("dtype") or stated.get("torch_dtype")
    if declared is None:
        problem = "dtype: found none in config.json, and no weights that have one; expected it: choose one with dtype="
        raise ConfigError("cannot tell how large the model is", [problem])
    return declared
