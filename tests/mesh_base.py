"""A tiny Llama in a directory, for tests on meshes and in several processes: every axis divides by 8. No torch."""

import json
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

import moe_lora_jax as mlj
from moe_lora_jax.models import CausalLM, DecoderConfig

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
ADAPTER = {"r": 2, "num_experts": 4, "top_k": 2, "target_modules": "all-linear"}


def write_base(directory: Path, **fields) -> Path:
    """Random weights in Hugging Face's layout."""
    config = {**CONFIG, **fields}
    model = CausalLM(DecoderConfig.from_hf(config), rngs=nnx.Rngs(0))
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        array, name = np.asarray(variable[...]), ".".join(map(str, path))
        is_kernel = path[-1] == "kernel"
        name = name.removesuffix(".kernel").removesuffix(".embedding") + ".weight" if path[-1] != "weight" else name
        tensors[name] = np.ascontiguousarray(array.T if is_kernel else array)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def adapted(base: Path, mesh: dict[str, int] | None, *, scan: bool = False, **fields) -> CausalLM:
    """That base with an adapter, on a mesh of all devices or on one device."""
    placed = None if mesh is None else mlj.make_mesh(mesh)
    model = mlj.load_base_model(base, mesh=placed, scan_layers=scan)
    config = mlj.MoeLoraConfig(**{**ADAPTER, **fields})
    return mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(params=1, dropout=2))
