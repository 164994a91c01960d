"""The Llama of the benchmarks, as a Hugging Face directory that both frameworks load, and its training step in JAX."""

import os
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import moe_lora_jax as mlj
from moe_lora_jax.train import Batch, adamw, make_train_step, split_model

FULL = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1408, "vocab_size": 4096}
QUICK = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}

LEARNING_RATE = 1e-6
"""So small that the routing hardly moves between the first round and the last."""


def save(
    directory: str | os.PathLike[str], *, quick: bool, tie_word_embeddings: bool = False, head_dim: int | None = None
) -> Path:
    """Writes the model and returns its directory: random fp32 weights, heads of 64 features, no ending id."""
    sizes = QUICK if quick else FULL
    heads = sizes["hidden_size"] // (head_dim or (16 if quick else 64))
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    set_seed(0)
    LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=heads, tie_word_embeddings=tie_word_embeddings, **ids)
    ).save_pretrained(directory)
    return Path(directory)


def training_step(model: mlj.CausalLM, ids: np.ndarray) -> Callable[[], float]:
    """The library's own compiled step on ids [batch, seq], every token a target: loss, gradient, AdamW. Call: loss."""
    optimizer = adamw(lambda step: jnp.float32(LEARNING_RATE), weight_decay=0.0, max_grad_norm=None)
    graphdef, state, frozen = split_model(model, mlj.MoeLoraParam, optimizer)
    step = make_train_step(graphdef, optimizer, model.moe_lora_config)  # type: ignore[attr-defined]
    micro = jnp.asarray(ids, jnp.int32)[None]
    batch = Batch(micro, jnp.ones_like(micro), jnp.ones(micro.shape, bool))

    def run() -> float:
        nonlocal state  # its buffers are donated
        state, metrics = step(state, frozen, batch)
        return float(metrics.lm_loss)

    return run
