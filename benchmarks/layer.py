"""Goal 1: one layer forward and backward, a mixture of E experts of rank r against plain LoRA of rank E*r."""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import moe_lora_jax as mlj
from benchmarks.measure import interleaved

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    print("tokens d E r k | time ratio [quartiles] | temporary memory ratio | flops ratio (router's rows allow)")
    for tokens, d, experts, r, k in SHAPES:
        x = jax.random.normal(jax.random.key(0), (tokens, d))
        cotangent = jax.random.normal(jax.random.key(1), (tokens, d))
        mixture, program = compiled(layer(d, experts, r, k), x, cotangent)
        lora, plain = compiled(layer(d, 1, experts * r, None), x, cotangent)
        ratio = interleaved({"mixture": mixture, "lora": lora}, "lora", rounds=rounds)["mixture"]
        memory = program.memory_analysis().temp_size_in_bytes / plain.memory_analysis().temp_size_in_bytes
        flops = program.cost_analysis()["flops"] / plain.cost_analysis()["flops"]
        lora_flops = 2 * tokens * d * d * 2 + 6 * tokens * 2 * d * experts * r
        allowed = 1 + 6 * tokens * d * experts / lora_flops
        print(f"{tokens} {d} {experts} {r} {k} | {ratio} | {memory:.3f} | {flops:.3f} ({allowed:.3f})", flush=True)


if __name__ == "__main__":
    main()
