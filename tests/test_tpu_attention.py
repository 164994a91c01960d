"""On TPU chips that need not exist: attention as libtpu compiles it, forwards and backwards, for packed rows."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import moe_lora_jax as mlj
from moe_lora_jax.compiled import topology
from moe_lora_jax.compiled.hlo import read_hlo
from moe_lora_jax.sharding import make_mesh, row_sharding

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is the extra [plan]"
)
CHIPS, LENGTH = 4, 768
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "use_sliding_window": True,
    "sliding_window": 200,
    "max_window_layers": 1,  # the second layer has it
}


def compiled(sizes, attention) -> tuple[set[str], int]:
    """Shapes [..., LENGTH, LENGTH] in the program of a gradient, and how many Pallas kernels it has."""
    mesh = make_mesh(sizes, devices=topology("v5e:2x2").devices)
    model = mlj.abstract_base_model(
        QWEN, dtype="bfloat16", attention=attention, scan_layers=True, remat="none", mesh=mesh
    )
    graph, state = nnx.split(model)
    rows = jax.ShapeDtypeStruct((CHIPS, LENGTH), jnp.int32, sharding=row_sharding(mesh))

    def loss(state, ids, segments):
        return jnp.mean(nnx.merge(graph, state).hidden_states(ids, segment_ids=segments), dtype=jnp.float32)

    text = jax.jit(jax.grad(loss)).lower(state, rows, rows).compile().as_text()
    instructions = [line for lines in read_hlo(text).computations.values() for line in lines]
    squares = {s for line in instructions for s in re.findall(rf"\w+\[[\d,]*\b{LENGTH},{LENGTH}\]", line.text)}
    return squares, sum('custom_call_target="tpu_custom_call"' in line.text for line in instructions)


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_a_tpu_makes_no_square_of_scores(sizes, caplog):
    squares, kernels = compiled(sizes, "auto")
    assert squares == set()
    assert kernels == 2 * 3  # of layers with and without a window: forwards, and backwards for q and for k and v
    assert caplog.messages == []


def test_all_scores_at_once_would_be_found():
    squares, kernels = compiled({"fsdp": 4}, "plain")
    assert squares and not kernels
