"""A base model in 8 and 4 bits on real text: memory, and the loss of the same training on the bfloat16 base.

    python tools/smollm2.py DIR && python -m benchmarks.quantized DIR

Needs the extra `quant` and the package chatterbot-corpus 1.3.3. Not among `make bench`: it takes half an hour on a CPU.
"""

import ctypes
import gc
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import moe_lora_jax as mlj
from benchmarks.machine import describe
from moe_lora_jax.train import load_tokenizer, next_token_loss, read_data

STEPS, BATCH, LENGTH, HELD_OUT = 50, 8, 32, 8
CONFIG = dict(r=8, lora_alpha=16, num_experts=4, top_k=2, target_modules="all-linear")
TOPICS = ("ai", "food", "history", "literature", "psychology", "science", "sports", "movies")


def bytes_of(model: nnx.Module, copies: int = 4) -> float:
    """Bytes that the model's variables take of this process: what it grows by for a copy of them.

    JAX's own numbers (`nbytes`, `on_device_size_in_bytes`) count a byte for a 4-bit integer; two share one.
    """
    copy = jax.jit(lambda array: array * jnp.ones((), array.dtype))  # an argument itself is not copied
    leaves = [leaf for leaf in jax.tree.leaves(nnx.state(model)) if jnp.issubdtype(leaf.dtype, jnp.number)]
    jax.block_until_ready([copy(leaf) for leaf in leaves])  # compiled
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again and not be seen
    before = resident()
    made = [jax.block_until_ready([copy(leaf) for leaf in leaves]) for _ in range(copies)]
    grown = resident() - before
    del made
    return grown / copies


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def rows_of(directory: str) -> np.ndarray:
    """Real sentences, end to end in rows of LENGTH tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "data.jsonl")
        script = Path(__file__).parent.parent / "tools" / "chatterbot.py"
        subprocess.run([sys.executable, str(script), str(target), *TOPICS], check=True, stdout=subprocess.DEVNULL)
        data = read_data(target, load_tokenizer(directory), max_length=256)
    ids = np.concatenate([example.ids for example in data.examples])
    rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return np.random.default_rng(0).permutation(rows)


def train(model: nnx.Module, rows: np.ndarray) -> tuple[float, float, float, float]:
    """Held-out loss before and after, mean training loss of the last ten steps, and seconds of a step."""
    mlj.apply_moe_lora(model, mlj.MoeLoraConfig(**CONFIG), rngs=nnx.Rngs(0))
    graph, adapter, frozen = nnx.split(model, mlj.MoeLoraParam, ...)
    optimizer = optax.adamw(1e-3)
    state = optimizer.init(adapter)

    def loss_of(adapter: nnx.State, frozen: nnx.State, ids: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, adapter, frozen, copy=True)(ids)
        return next_token_loss(logits.astype(jnp.float32), ids, jnp.ones_like(ids)).mean

    @jax.jit
    def step(adapter, state, frozen, ids):
        loss, gradient = jax.value_and_grad(loss_of)(adapter, frozen, ids)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    evaluate = jax.jit(loss_of)
    held_out = np.split(rows[: HELD_OUT * BATCH], HELD_OUT)
    batches = rows[HELD_OUT * BATCH :]
    before = statistics.mean(float(evaluate(adapter, frozen, ids)) for ids in held_out)
    losses, seconds = [], []
    for i in range(STEPS):
        start = time.perf_counter()
        ids = batches[np.arange(i * BATCH, (i + 1) * BATCH) % len(batches)]
        adapter, state, loss = step(adapter, state, frozen, ids)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
    after = statistics.mean(float(evaluate(adapter, frozen, ids)) for ids in held_out)
    return before, after, statistics.mean(losses[-10:]), statistics.median(seconds)


def main(directory: str, *kinds: str) -> None:
    print(f"{describe()}\n{STEPS} steps of {BATCH} x {LENGTH} tokens, adapter fp32: {CONFIG}", flush=True)
    rows = rows_of(directory)
    print(f"{len(rows)} rows of chatterbot-corpus, {HELD_OUT * BATCH} held out\n", flush=True)
    print("| base | MB | of bf16 | held-out loss before | after | of bf16 | training loss, last 10 | s/step |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    reference: tuple[float, float] | None = None
    for kind in ("bfloat16", *(kinds or ("int8", "nf4", "int4"))):
        model = mlj.load_base_model(directory, dtype="bfloat16")
        if kind != "bfloat16":
            mlj.quantize_base(model, kind)  # type: ignore[arg-type]
        size = bytes_of(model)
        print(f"{kind}: {size / 1e6:.1f} MB", file=sys.stderr, flush=True)
        before, after, last, seconds = train(model, rows)
        reference = reference or (size, after)
        shares = size / reference[0], after / reference[1]
        numbers = f"{before:.4f} | {after:.4f} | {shares[1]:.4f} | {last:.4f} | {seconds:.2f}"
        print(f"| {kind} | {size / 1e6:.1f} | {shares[0]:.3f} | {numbers} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
