"""What the training tests share: a tiny Llama with an adapter, and random token data. No test of its own."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

import moe_lora_jax as mlj
from moe_lora_jax.demo import small_base
from moe_lora_jax.demo.topics import questions, sentences
from moe_lora_jax.models import CausalLM, DecoderConfig
from moe_lora_jax.train.data import Example, TokenData

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
TARGETS = ["q_proj", "v_proj", "down_proj"]
MODULES = len(TARGETS)


def tiny_base(seed: int = 0) -> CausalLM:
    """A random Llama: hidden size 32, 1 layer, 64 tokens."""
    return CausalLM(DecoderConfig.from_hf(LLAMA), rngs=nnx.Rngs(seed))


def tiny_model(seed: int = 0, **fields) -> CausalLM:
    """`tiny_base` with an adapter: 3 experts of rank 2, top 2, on q_proj, v_proj and down_proj, not the identity."""
    sizes = {"r": 2, "lora_alpha": 4, "num_experts": 3, "top_k": 2}
    config = mlj.MoeLoraConfig(**{**sizes, "target_modules": TARGETS, "init_lora_weights": False, **fields})
    return mlj.apply_moe_lora(tiny_base(seed), config, rngs=nnx.Rngs(params=seed + 1, dropout=seed + 2))


def token_data(examples: int, seed: int = 0, low: int = 5, high: int = 20) -> TokenData:
    """Random sequences of `low` to `high` - 1 tokens; the first third of each has no loss."""
    rng = np.random.default_rng(seed)
    made = []
    for line in range(1, examples + 1):
        length = int(rng.integers(low, high))
        ids = rng.integers(1, LLAMA["vocab_size"], length).astype(np.int32)
        made.append(Example(ids, np.arange(length) >= length // 3, line))
    return TokenData(Path("made_up.jsonl"), tuple(made))


@pytest.fixture(scope="module")
def small_dirs(tmp_path_factory):
    """Makes quickstart's base models tiny, and one of them: {"base": model directory, "data": JSONL of questions}."""
    made = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        patch.setattr(small_base, "CONFIG", {**small_base.CONFIG, **sizes})
        fields = {"vocab_size": 280, "steps": 1, "seed": 0}
        small_base.make_small_base(made / "base", sentences(5, 0), **fields)
        lines = [json.dumps(q._asdict()) for q in questions(5, 0)]
        (made / "data.jsonl").write_text("\n".join(lines) + "\n")
        yield {"base": made / "base", "data": made / "data.jsonl"}


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Programs that several runs of a module share are compiled once, and cheaply: every run has its own jit."""
    cache = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in cache} | {"jax_disable_most_optimizations": False}
    for name, value in zip(before, (str(tmp_path_factory.mktemp("programs")), 0, True), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def arrays(model: nnx.Module, only=...) -> dict[str, np.ndarray]:
    """{path: value} of a model's variables, as numpy; random keys are left out."""
    flat = nnx.to_flat_state(nnx.state(model, only))
    return {
        ".".join(map(str, path)): np.asarray(variable[...])
        for path, variable in flat
        if jnp.issubdtype(variable.dtype, jnp.number)
    }
