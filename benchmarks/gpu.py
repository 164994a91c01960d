"""Goals 1 and 2 on a CUDA device in bf16, and whether computing only the chosen experts would pay there.

    python -m benchmarks.gpu            # needs a CUDA build of jax and a device
    python -m benchmarks.gpu --quick    # tiny sizes on any device: shows that the script works, and no speed

Work is counted by formula (a product of [m, k] and [k, n] is 2 m k n), and compared with the rate of one large bf16
product on the same device, not with the vendor's number.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import moe_lora_jax as mlj
from benchmarks import llama
from benchmarks.measure import Row, interleaved
from benchmarks.table import alone, ratio_row
from moe_lora_jax.layers.mixing import gated_sum
from moe_lora_jax.models import DecoderConfig

TOP_K = 2
MIXTURES = [(8, 8), (8, 32), (32, 32), (64, 32)]
"""(experts, rank of each): experts * rank from 64 to 2048."""
LLAMA = {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 32000}


def peak(size: int) -> tuple[float, Row]:
    """FLOP/s of a bf16 product of two square matrices, and its row."""
    a = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    seconds = interleaved({"product": lambda: product(a, a)}, "product", rounds=10, repeats=10)["product"].seconds
    rate = 2 * size**3 / seconds
    return rate, Row("bf16 product, the device's own peak", f"{rate / 1e12:.3g} TFLOP/s", "", None, f"{size} x {size}")


def layer(d: int, experts: int, rank: int, top_k: int | None) -> mlj.MoeLoraLinear:
    """A bf16 layer with a bf16 adapter."""
    config = mlj.MoeLoraConfig(r=rank, num_experts=experts, top_k=top_k, init_lora_weights=False)
    base = nnx.Linear(d, d, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    sizes = config.for_module("layer")
    return mlj.MoeLoraLinear(base, d, d, sizes, config=config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(1))


def gradients(module: nnx.Module, x: jax.Array) -> Callable[[], Any]:
    """Forward, and the gradients for x and the adapter, compiled."""
    graph, adapter, rest = nnx.split(module, mlj.MoeLoraParam, ...)

    def loss(adapter: nnx.State, x: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, adapter, rest)(x).astype(jnp.float32) ** 2)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return lambda: step(adapter, x)


def layers(tokens: int, d: int, peak_rate: float, *, quick: bool) -> Iterator[Row]:
    """The mixture's layer over LoRA's of the same total rank."""
    x = jax.random.normal(jax.random.key(0), (tokens, d), jnp.bfloat16)
    for experts, rank in MIXTURES[:1] if quick else MIXTURES:
        steps = {
            "mixture": gradients(layer(d, experts, rank, TOP_K), x),
            "lora": gradients(layer(d, 1, experts * rank, None), x),
        }
        found = interleaved(steps, "lora", rounds=3 if quick else 30, repeats=1 if quick else 10)["mixture"]
        work = (
            2 * tokens * (2 * d * d + 3 * 2 * d * experts * rank + 3 * d * experts)
        )  # base: y and dx; A, B, router: 3
        rate = work / found.seconds
        note = (
            f"{tokens} tokens, d {d}, E {experts}, r {rank}; {rate / 1e12:.3g} TFLOP/s, {rate / peak_rate:.0%} of peak"
        )
        yield ratio_row("1. layer <= 1.02x of LoRA of rank E*r", found, found.median <= 1.02, note)


def dense_delta(x: jax.Array, gates: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """sum_e g_e B_e A_e x as the library computes it: all experts at once, most gates being 0.

    x [token, in], gates [token, expert], a [expert, rank, in], b [expert, rank, out].
    """
    hidden = (x @ a.reshape(-1, a.shape[-1]).T).reshape(len(x), *a.shape[:2])
    return gated_sum(hidden, gates, b)


def sparse_delta(x: jax.Array, gates: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The same from the chosen experts only: tokens sorted by expert, one grouped product for A and one for B."""
    weights, chosen = jax.lax.top_k(gates, TOP_K)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    token, sizes = order // TOP_K, jnp.bincount(chosen.reshape(-1), length=len(a))
    hidden = jax.lax.ragged_dot(x[token], a.swapaxes(1, 2), sizes) * weights.reshape(-1)[order, None].astype(x.dtype)
    return jnp.zeros((len(x), b.shape[-1]), x.dtype).at[token].add(jax.lax.ragged_dot(hidden, b, sizes))


def sparse(tokens: int, d: int, *, quick: bool) -> Iterator[Row]:
    """The sparse form over the dense one, forward and backward."""
    for experts, rank in MIXTURES[:1] if quick else MIXTURES:
        keys = jax.random.split(jax.random.key(0), 4)
        x = jax.random.normal(keys[0], (tokens, d), jnp.bfloat16)
        logits = jax.random.normal(keys[1], (tokens, experts))
        kept = logits >= jax.lax.top_k(logits, TOP_K)[0][:, -1:]
        gates = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf))
        a, b = (jax.random.normal(key, (experts, rank, d), jnp.bfloat16) / math.sqrt(d) for key in keys[2:])

        def step(delta: Callable[..., jax.Array], *values: jax.Array) -> Callable[[], Any]:
            def loss(*values: jax.Array) -> jax.Array:
                return jnp.sum(delta(*values).astype(jnp.float32) ** 2)

            compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
            return lambda: compiled(*values)

        steps = {"sparse": step(sparse_delta, x, gates, a, b), "dense": step(dense_delta, x, gates, a, b)}
        found = interleaved(steps, "dense", rounds=3 if quick else 30, repeats=1 if quick else 10)
        note = (
            f"{tokens} tokens, d {d}, E {experts}, r {rank}, top {TOP_K}; dense {found['dense'].seconds * 1e3:.3g} ms"
        )
        yield ratio_row("adapter's delta, sparse (ragged_dot) over dense; below 1 it pays", found["sparse"], None, note)


class Given(nnx.Module):
    """Stands for the embedding: returns what the gradient is taken of, so that a frozen base has a backward pass."""

    def __init__(self, rows: jax.Array):
        self.rows = nnx.Param(rows)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.rows[...]


def frozen_step(model: mlj.CausalLM, ids: np.ndarray) -> Callable[[], Any]:
    """Loss and its gradient for the embeddings' output, without any adapter: what every step on this base costs."""
    model.model.embed_tokens = Given(model.model.embed_tokens(jnp.asarray(ids).reshape(-1)))  # type: ignore[assignment]
    graph, given, rest = nnx.split(model, lambda path, _: path[-1] == "rows", ...)

    def loss(given: nnx.State) -> jax.Array:
        logits = nnx.merge(graph, given, rest)(jnp.asarray(ids))[:, :-1].astype(jnp.float32)
        taken = jnp.take_along_axis(logits, jnp.asarray(ids)[:, 1:, None], axis=-1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - taken[..., 0])

    step = jax.jit(jax.value_and_grad(loss))
    return lambda: step(given)


def models(batch: int, length: int, *, quick: bool) -> Iterator[Row]:
    """The training step, and the adapters' own part of it, over LoRA's."""
    sizes = llama.QUICK if quick else LLAMA
    heads = {"num_attention_heads": sizes["hidden_size"] // (16 if quick else 64)}
    stated = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **sizes, **heads}
    ids = np.random.default_rng(0).integers(0, sizes["vocab_size"], (batch, length))

    def model(**fields: int) -> mlj.CausalLM:
        base = mlj.CausalLM(DecoderConfig.from_hf(stated), rngs=nnx.Rngs(0))
        if fields:
            config = mlj.MoeLoraConfig(**fields, target_modules="all-linear", init_lora_weights=False)  # type: ignore[arg-type]
            mlj.apply_moe_lora(base, config, rngs=nnx.Rngs(1), param_dtype=jnp.bfloat16)
        return base

    for experts, rank in MIXTURES[:1] if quick else MIXTURES[:2]:
        steps: dict[str, Callable[[], Any]] = {
            "mixture": llama.training_step(model(r=rank, num_experts=experts, top_k=TOP_K), ids),
            "lora": llama.training_step(model(r=experts * rank, num_experts=1), ids),
            "frozen": frozen_step(model(), ids),
        }
        found = interleaved(steps, "lora", rounds=3 if quick else 20)
        base, lora = found["frozen"].seconds, found["lora"].seconds
        own = (found["mixture"].seconds - base) / (lora - base)
        speeds = ", ".join(f"{n} {batch * length / r.seconds:.0f}" for n, r in found.items())
        note = f"{batch * length} tokens, E {experts}, r {rank}, all linear layers; tokens/s: {speeds}"
        yield ratio_row(
            "2. training step <= 1.03x of LoRA of rank E*r", found["mixture"], found["mixture"].median <= 1.03, note
        )
        yield Row("adapters' own part of the step, mixture over LoRA", f"{own:.3f}", "", None, "of the medians above")


def rows(quick: bool) -> Iterator[Row]:
    if not quick and jax.default_backend() != "gpu":
        yield Row("goals 1 and 2 on a GPU", "not measured", "", None, f"jax sees no CUDA device: {jax.devices()}")
        return
    rate, row = peak(64 if quick else 8192)
    yield row
    tokens, d = (32, 64) if quick else (8192, 4096)
    yield from layers(tokens, d, rate, quick=quick)
    yield from sparse(tokens, d, quick=quick)
    yield from models(*((2, 16) if quick else (8, 1024)), quick=quick)


if __name__ == "__main__":
    print(jax.devices())
    alone(rows)
