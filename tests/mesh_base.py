"""A tiny Llama in a directory, for tests on meshes and in several processes: every axis divides by 8. No torch."""

import json
from pathlib import Path

from flax import nnx
from tiny_training import LLAMA

import moe_lora_jax as mlj
from moe_lora_interop.disk.files import write_tensors
from moe_lora_jax.demo.small_base import stored_tensors
from moe_lora_jax.models import CausalLM, DecoderConfig

# 72 tokens, so that no other weight has the table's shape, on part of the devices either
CONFIG = {**LLAMA, "num_hidden_layers": 2, "tie_word_embeddings": False, "vocab_size": 72}
GEMMA = {  # a scaled embedding, which is the head too
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "tie_word_embeddings": True,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
}
ADAPTER = {"r": 2, "num_experts": 4, "top_k": 2, "target_modules": "all-linear"}


def write_base(directory: Path, **fields) -> Path:
    """Random weights in Hugging Face's layout."""
    config = {**CONFIG, **fields}
    model = CausalLM(DecoderConfig.from_hf(config), rngs=nnx.Rngs(0))
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_tensors(directory / "model.safetensors", stored_tensors(model), {"format": "pt"})
    return directory


def adapted(base: Path, mesh: dict[str, int] | None, *, scan: bool = False, **fields) -> CausalLM:
    """That base with an adapter, on a mesh of all devices or on one device."""
    placed = None if mesh is None else mlj.make_mesh(mesh)
    model = mlj.load_base_model(base, mesh=placed, scan_layers=scan)
    config = mlj.MoeLoraConfig(**{**ADAPTER, **fields})
    return mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(params=1, dropout=2))
