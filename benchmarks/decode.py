"""Goal 8: tokens per second of `generate` with its cache: the base model, LoRA of rank E*r, and the mixture.

A model in a Hugging Face directory can be measured instead of the small one: `python -m benchmarks.decode DIRECTORY`
(`python tools/smollm2.py DIRECTORY` writes SmolLM2-135M there).
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from flax import nnx

import moe_lora_jax as mlj
from benchmarks import llama
from benchmarks.measure import Row, interleaved
from benchmarks.table import alone, ratio_row

EXPERTS, RANK, TOP_K = 8, 8, 2
PROMPT, NEW = 16, 64


def adapted(base: Path, **fields: int) -> mlj.CausalLM:
    model = mlj.load_base_model(base, dtype="float32")
    if fields:
        config = mlj.MoeLoraConfig(**fields, target_modules="all-linear", init_lora_weights=False)  # type: ignore[arg-type]
        mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(0))
    return model


def decoding(model: mlj.CausalLM, batch: int, new: int) -> Callable[[], jax.Array]:
    """Greedy generation of `new` tokens that no ending id cuts short."""
    prompt = jax.random.randint(jax.random.key(0), (batch, PROMPT), 3, model.config.vocab_size)
    return lambda: mlj.generate(model, prompt, max_new_tokens=new, eos_token_id=())


def measure(base: Path, name: str, *, quick: bool) -> Iterator[Row]:
    models = {
        "base": adapted(base),
        "lora": adapted(base, r=EXPERTS * RANK, num_experts=1),
        "mixture": adapted(base, r=RANK, num_experts=EXPERTS, top_k=TOP_K),
    }
    new = 4 if quick else NEW
    for batch in (1, 8):
        found = interleaved({n: decoding(m, batch, new) for n, m in models.items()}, "lora", rounds=3 if quick else 10)
        speeds = ", ".join(f"{n} {batch * new / r.seconds:.0f}" for n, r in found.items())
        note = f"{name}, batch {batch}, E {EXPERTS}, r {RANK}, top {TOP_K}, all linear layers, fp32; tokens/s: {speeds}"
        ratio = found["mixture"]
        met = ratio.median <= 1.1 if batch == 1 else None
        yield ratio_row("8. decoding, mixture <= 1.1x of LoRA per token at batch 1", ratio, met, note)


def rows(quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        base = llama.save(Path(scratch), quick=quick)
        yield from measure(base, "2-layer Llama" if quick else "8-layer Llama of width 512", quick=quick)


if __name__ == "__main__":
    alone(rows, lambda directory, quick: measure(directory, directory.name, quick=quick))
