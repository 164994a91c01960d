"""Goal 4: the compiled program's size in the number of experts and layers, and what scan and remat do to its memory."""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

import moe_lora_jax as mlj
from benchmarks.llama import FULL, QUICK
from benchmarks.measure import Row
from benchmarks.table import alone
from moe_lora_jax.models import DecoderConfig
from moe_lora_jax.models.stacked import stack_layers, unstack_layers

BATCH, LENGTH = 8, 128


def gradient(*, layers: int, experts: int, scan_layers: bool, remat: str, quick: bool) -> jax.stages.Lowered:
    """The gradient of the mean log-likelihood for the adapter. No weights are made: shapes suffice.

    A scanned program takes its layers stacked, as the library's train step does.
    """
    sizes = QUICK if quick else FULL
    heads = sizes["hidden_size"] // (16 if quick else 64)
    stated = {**sizes, "num_hidden_layers": layers, "num_attention_heads": heads, "architectures": ["LlamaForCausalLM"]}

    def make() -> mlj.CausalLM:
        model = mlj.CausalLM(DecoderConfig.from_hf(stated), rngs=nnx.Rngs(0))
        model.model.scan_layers, model.model.remat = scan_layers, remat
        config = mlj.MoeLoraConfig(r=8, num_experts=experts, top_k=2, target_modules="all-linear")
        return mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(0))  # type: ignore[return-value]

    graph, *states = nnx.split(nnx.eval_shape(make), mlj.MoeLoraParam, ...)
    adapter, rest = jax.eval_shape(stack_layers, states) if scan_layers else states

    def loss(adapter: nnx.State, rest: nnx.State, ids: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, *unstack_layers((adapter, rest)), copy=True)(ids)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1))

    ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    return jax.jit(jax.value_and_grad(loss)).lower(adapter, rest, ids)


def instructions(lowered: jax.stages.Lowered) -> int:
    """Of the optimised HLO."""
    return len(re.findall(r"^ +(?:ROOT )?%\S+ = ", lowered.compile().as_text(), re.MULTILINE))


def rows(quick: bool) -> Iterator[Row]:
    def size(**changes: int | bool | str) -> int:
        return instructions(gradient(**{**plain, **changes}))  # type: ignore[arg-type]

    plain = {"layers": 2, "experts": 8, "scan_layers": False, "remat": "none", "quick": quick}
    few, many = size(), size(experts=32)
    note = f"{few} and {many} HLO instructions, 2 layers"
    yield Row(
        "4. program for 32 experts within 2 % of that for 8", f"{many / few:.3f}", "", abs(many / few - 1) <= 0.02, note
    )

    shallow, deep = size(scan_layers=True), size(scan_layers=True, layers=8)
    loop = size(layers=8)
    note = f"{shallow} and {deep} HLO instructions; the loop over 8 layers has {loop}"
    yield Row(
        "4. scanned program for 8 layers within 2 % of that for 2",
        f"{deep / shallow:.3f}",
        "",
        deep / shallow <= 1.02,
        note,
    )

    layers = 2 if quick else 8
    memory = {
        (scan, remat): gradient(layers=layers, experts=8, scan_layers=scan, remat=remat, quick=quick)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for scan, remat in ((False, "none"), (True, "none"), (True, "full"))
    }
    ratio = memory[True, "full"] / memory[True, "none"]
    note = f"{layers} layers, {BATCH} x {LENGTH} tokens, E 8, r 8; MiB: " + ", ".join(
        f"{name} {memory[key] / 2**20:.0f}"
        for name, key in (("loop", (False, "none")), ("scan", (True, "none")), ("scan and remat", (True, "full")))
    )
    yield Row("4. temporary memory of scan and remat <= 0.25x of scan", f"{ratio:.3f}", "", ratio <= 0.25, note)


if __name__ == "__main__":
    alone(rows)
