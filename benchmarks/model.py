"""Goal 2: the training step of a small Llama against plain LoRA of rank E*r here, PEFT's LoRA, and a loop over experts.

All in fp32, every linear layer adapted, loss on every next token, gradient and AdamW. The step of the frozen base has
no adapter to train: it is the forward pass and the backward pass to the embeddings' output, in both frameworks.

A model in a Hugging Face directory can be measured instead of the small one: `python -m benchmarks.model DIRECTORY`
(`python tools/smollm2.py DIRECTORY` writes SmolLM2-135M there).
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from flax import nnx
from transformers import LlamaForCausalLM

import moe_lora_jax as mlj
from benchmarks import llama
from benchmarks.expert_loop import add_expert_loops
from benchmarks.measure import Row, interleaved
from benchmarks.table import alone
from moe_lora_jax.train import next_token_loss

EXPERTS, RANK, TOP_K = 8, 8, 2
BATCH, LENGTH = 8, 128


class Moved(nnx.Module):
    """Embeddings plus an offset, for a gradient at their output."""

    def __init__(self, embed: nnx.Embed, offset: jax.Array):
        self.embed, self.offset = embed, nnx.BatchStat(offset)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embed(ids) + self.offset[...]

    def attend(self, hidden: jax.Array) -> jax.Array:
        return self.embed.attend(hidden)  # the head of a model with tied embeddings


def jax_base(directory: Path, ids: np.ndarray) -> Callable[[], Any]:
    model = mlj.load_base_model(directory, dtype="float32")
    model.model.embed_tokens = Moved(model.model.embed_tokens, jnp.zeros((ids.size, model.config.hidden_size)))
    graph, offset, frozen = nnx.split(model, nnx.BatchStat, ...)
    tokens, counted = jnp.asarray(ids, jnp.int32), jnp.ones(ids.shape, bool)

    def loss(offset: nnx.State, frozen: nnx.State) -> jax.Array:
        return next_token_loss(nnx.merge(graph, offset, frozen, copy=True)(tokens), tokens, counted).mean

    step = jax.jit(jax.value_and_grad(loss))
    return lambda: step(offset, frozen)


def jax_adapter(directory: Path, ids: np.ndarray, **fields: int) -> Callable[[], object]:
    model = mlj.load_base_model(directory, dtype="float32")
    config = mlj.MoeLoraConfig(**fields, target_modules="all-linear", init_lora_weights=False)  # type: ignore[arg-type]
    mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(0))
    model.train()
    return llama.training_step(model, ids)


def loaded(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)


def torch_base(directory: Path, ids: np.ndarray) -> Callable[[], object]:
    model = loaded(directory).requires_grad_(False)
    tokens = torch.from_numpy(ids)

    def run() -> float:
        embedded = model.get_input_embeddings()(tokens).requires_grad_()
        loss = model(inputs_embeds=embedded, labels=tokens).loss
        loss.backward()
        return float(loss.detach())

    return run


def torch_step(model: torch.nn.Module, ids: np.ndarray) -> Callable[[], object]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=llama.LEARNING_RATE)
    tokens = torch.from_numpy(ids)

    def run() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return run


def torch_lora(directory: Path, ids: np.ndarray) -> Callable[[], object]:
    config = peft.LoraConfig(r=EXPERTS * RANK, lora_alpha=EXPERTS * RANK, target_modules="all-linear")
    return torch_step(peft.get_peft_model(loaded(directory), config).train(), ids)


def torch_loop(directory: Path, ids: np.ndarray) -> Callable[[], object]:
    model = loaded(directory).requires_grad_(False)
    add_expert_loops(model.model, experts=EXPERTS, rank=RANK, top_k=TOP_K)
    return torch_step(model.train(), ids)


def measure(directory: Path, name: str, *, batch: int, length: int, rounds: int) -> Iterator[Row]:
    ids = np.random.default_rng(0).integers(3, 250, (batch, length))
    candidates: dict[str, Callable[[], Any]] = {
        "JAX base": jax_base(directory, ids),
        "JAX LoRA": jax_adapter(directory, ids, r=EXPERTS * RANK, num_experts=1),
        "JAX mixture": jax_adapter(directory, ids, r=RANK, num_experts=EXPERTS, top_k=TOP_K),
        "PyTorch base": torch_base(directory, ids),
        "PEFT LoRA": torch_lora(directory, ids),
        "PyTorch loop": torch_loop(directory, ids),
    }
    loss, _ = candidates["JAX base"]()
    np.testing.assert_allclose(loss, candidates["PyTorch base"](), rtol=1e-4)  # the same base in both frameworks
    found = interleaved(candidates, "JAX mixture", rounds=rounds)
    seconds = {who: ratio.seconds for who, ratio in found.items()}
    times = ", ".join(f"{who} {s * 1e3:.0f} ms = {ids.size / s:.0f} tokens/s" for who, s in seconds.items())
    mixture = seconds["JAX mixture"]
    for other, limit in (("JAX LoRA", 1.03), ("PEFT LoRA", 1.10), ("PyTorch loop", 0.5)):
        ratio = 1 / found[other].median
        quartiles = f"{1 / found[other].high:.3f} to {1 / found[other].low:.3f}"
        yield Row(
            f"2. training step <= {limit}x of {other}", f"{ratio:.3f}", quartiles, ratio <= limit, f"{name}; {times}"
        )
    own = (mixture - seconds["JAX base"]) / (seconds["PEFT LoRA"] - seconds["PyTorch base"])
    note = f"{name}; the step minus that of the frozen base, both in their own framework"
    yield Row("2. the adapters' own cost <= 1x of PEFT LoRA's", f"{own:.3f}", "", own <= 1, note)


def described(name: str, batch: int, length: int) -> str:
    return f"{name}, {batch} x {length} tokens, E {EXPERTS}, r {RANK}, top {TOP_K}"


def rows(quick: bool) -> Iterator[Row]:
    batch, length, rounds = (2, 16, 3) if quick else (BATCH, LENGTH, 7)
    with tempfile.TemporaryDirectory() as scratch:
        name = described(str(llama.QUICK if quick else llama.FULL), batch, length)
        yield from measure(llama.save(scratch, quick=quick), name, batch=batch, length=length, rounds=rounds)


def rows_of(directory: Path, quick: bool) -> Iterator[Row]:
    batch, length, rounds = (1, 16, 3) if quick else (4, LENGTH, 5)
    name = described(directory.name, batch, length)
    yield from measure(directory, name, batch=batch, length=length, rounds=rounds)


if __name__ == "__main__":
    alone(rows, rows_of)
