"""Packing: real tokens per second of training steps, one example to a row and several, beside the padding saved.

Chat data that are short: lengths of a log-normal distribution, 60 tokens in the mean, 512 at most. Both sides take the
batches that a run takes (`TrainBatches`): 8 examples, padded to the smallest of 32, 64, 128, 256, 512 that holds them,
so that short batches are short already, against 2 packed rows of 512. An epoch is timed, without its last batch, which
blank rows fill up. The length ratio is that of padded tokens per real token: what is saved if time goes with tokens.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import moe_lora_jax as mlj
from benchmarks import llama
from benchmarks.measure import Row, interleaved
from benchmarks.table import alone
from moe_lora_jax.train import Batch, TrainBatches, adamw, make_train_step, split_model
from moe_lora_jax.train.examples import Example
from moe_lora_jax.train.packing import PackedRows

MEAN, LONGEST = 60, 512
APART, PACKED = 8, 2  # rows of a batch


def chat(examples: int, longest: int) -> list[Example]:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(MEAN) - 0.5, 1.0, examples).astype(int), 4, longest)
    return [Example(rng.integers(3, 250, n).astype(np.int32), np.ones(n, bool), i) for i, n in enumerate(lengths)]


def batches(source: Any, rows: int) -> list[Batch]:
    """Of one epoch, without the last one, which blank rows fill up."""
    made = TrainBatches(source, batch_size=rows, gradient_accumulation=1, epochs=1, seed=0, pad_id=0)
    return [host.batch for host in made][:-1]


def epoch(directory: Path, chosen: list[Batch]) -> Callable[[], object]:
    model = mlj.load_base_model(directory, dtype="float32")
    config = mlj.MoeLoraConfig(r=8, num_experts=4, top_k=2, target_modules="all-linear")
    mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(0))
    model.train()
    optimizer = adamw(lambda step: jnp.float32(llama.LEARNING_RATE), weight_decay=0.0, max_grad_norm=None)
    graphdef, state, frozen = split_model(model, mlj.MoeLoraParam, optimizer)
    step = make_train_step(graphdef, optimizer, config)

    def run() -> object:
        nonlocal state  # its buffers are donated
        for batch in chosen:
            state, metrics = step(state, frozen, batch)
        return metrics.loss

    return run


def rows(quick: bool) -> Iterator[Row]:
    longest, count, rounds = (64, 60, 2) if quick else (LONGEST, 120, 5)
    examples = chat(count, longest)
    packed = PackedRows(examples, longest, seed=0)
    sides = {"apart": batches(examples, APART), "packed": batches(packed, PACKED)}
    real = {name: sum(int(np.sum(b.attention_mask)) for b in side) for name, side in sides.items()}
    all_tokens = {name: sum(b.input_ids.size for b in side) for name, side in sides.items()}
    length_ratio = all_tokens["apart"] / real["apart"] * real["packed"] / all_tokens["packed"]
    with tempfile.TemporaryDirectory() as folder:
        directory = llama.save(folder, quick=quick)
        found = interleaved({name: epoch(directory, side) for name, side in sides.items()}, "packed", rounds=rounds)
    times = found["apart"]
    faster, low, high = (x * real["packed"] / real["apart"] for x in (times.median, times.low, times.high))
    full = {name: f"{real[name] / all_tokens[name]:.0%}" for name in sides}
    note = (
        f"tokens/s {faster:.2f} times as many, length ratio {length_ratio:.2f}: {full['apart']} of the tokens are real "
        f"in batches of {APART} examples, {full['packed']} in {PACKED} rows of {longest}; "
        f"{real['packed'] / found['packed'].seconds:,.0f} real tokens/s packed"
    )
    share = faster / length_ratio
    spread = f"{low / length_ratio:.2f} to {high / length_ratio:.2f}"
    goal = "packing: gain in tokens/s over the length ratio, at least 0.9"
    yield Row(goal, f"{share:.2f}", spread, share >= 0.9, note)


if __name__ == "__main__":
    alone(rows)
