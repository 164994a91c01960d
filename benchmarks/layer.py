"""Goal 1: one layer forward and backward, a mixture of E experts of rank r against plain LoRA of rank E*r."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import moe_lora_jax as mlj
from benchmarks.measure import Row, interleaved
from benchmarks.table import alone, ratio_row

SHAPES = [(512, 512, 8, 8, 2), (2048, 512, 8, 16, 2), (512, 2048, 16, 8, 2), (512, 2048, 64, 4, 2)]


def layer(d: int, experts: int, r: int, top_k: int | None) -> mlj.MoeLoraLinear:
    config = mlj.MoeLoraConfig(r=r, num_experts=experts, top_k=top_k, init_lora_weights=False)
    base = nnx.Linear(d, d, use_bias=False, rngs=nnx.Rngs(0))
    return mlj.MoeLoraLinear(base, d, d, config.for_module("layer"), config=config, rngs=nnx.Rngs(1))


def step(module: nnx.Module) -> tuple[Any, tuple[Any, ...]]:
    """The compiled gradient of sum(y * cotangent) for x and the adapter's variables; and its first arguments."""
    graph, adapter, rest = nnx.split(module, mlj.MoeLoraParam, ...)

    def loss(adapter: nnx.State, x: jax.Array, rest: nnx.State, cotangent: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graph, adapter, rest)(x) * cotangent)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), (adapter, rest)


def compiled(module: nnx.Module, x: jax.Array, cotangent: jax.Array) -> tuple[Callable[[], Any], Any]:
    function, (adapter, rest) = step(module)
    program = function.lower(adapter, x, rest, cotangent).compile()
    return (lambda: program(adapter, x, rest, cotangent)), program


def rows(quick: bool) -> Iterator[Row]:
    for tokens, d, experts, r, k in SHAPES[:1] if quick else SHAPES:
        x = jax.random.normal(jax.random.key(0), (tokens, d))
        cotangent = jax.random.normal(jax.random.key(1), (tokens, d))
        mixture, program = compiled(layer(d, experts, r, k), x, cotangent)
        lora, plain = compiled(layer(d, 1, experts * r, None), x, cotangent)
        case = f"{tokens} tokens, d {d}, E {experts}, r {r}, k {k}"

        limit = 1.05 if experts == 64 else 1.02
        rounds = 10 if quick else 150 if d == 512 else 50
        time = interleaved({"mixture": mixture, "lora": lora}, "lora", rounds=rounds)["mixture"]
        note = f"{case}; {time.seconds * 1e3:.1f} ms"
        yield ratio_row(f"1. layer time <= {limit}x of LoRA of rank E*r", time, time.median <= limit, note)

        memory = program.memory_analysis().temp_size_in_bytes / plain.memory_analysis().temp_size_in_bytes
        yield Row("1. its temporary memory <= 1.05x", f"{memory:.3f}", "", memory <= 1.05, case)

        flops = program.cost_analysis()["flops"] / plain.cost_analysis()["flops"]
        lora_flops = 2 * tokens * d * d * 2 + 6 * tokens * 2 * d * experts * r
        allowed = 1.02 * (1 + 6 * tokens * d * experts / lora_flops)
        yield Row(
            "1. its FLOPs <= 1.02x of LoRA and the router",
            f"{flops:.3f}",
            "",
            flops <= allowed,
            f"{case}; {allowed:.3f}",
        )


if __name__ == "__main__":
    alone(rows)
