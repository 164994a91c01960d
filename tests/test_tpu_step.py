"""On four TPU chips that need not exist: where an adapter lies, and a whole train step as libtpu compiles it."""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import moe_lora_jax as mlj
from moe_lora_jax.compiled import topology
from moe_lora_jax.compiled.hlo import read_hlo
from moe_lora_jax.sharding import make_mesh, row_sharding
from moe_lora_jax.train import Batch, TrainSettings
from moe_lora_jax.train.setup import set_up

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is the extra [plan]"
)
CHIPS, LENGTH, CHUNK = 4, 512, 128
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MIB = 2**20


@pytest.mark.parametrize(
    ("sizes", "fields", "expected"),
    [
        (
            {"fsdp": 2, "tensor": 2},
            {},
            {
                "q_proj.lora_a": P(None, "tensor", "fsdp"),
                "q_proj.lora_b": P(None, None, ("tensor", "fsdp")),
                "q_proj.router.kernel": P("fsdp", None),
                "q_proj.router.bias": P(),
                "o_proj.lora_a": P(None, None, ("tensor", "fsdp")),
                "o_proj.lora_b": P(None, "tensor", "fsdp"),
                "o_proj.router.kernel": P(("tensor", "fsdp"), None),
            },
        ),
        (
            {"data": 2, "tensor": 2},
            {},
            {"q_proj.lora_a": P(None, "tensor", None), "o_proj.lora_b": P(None, "tensor", None)},
        ),
        (  # one expert's rank would be summed over the chips
            {"data": 2, "tensor": 2},
            {"num_experts": 1, "top_k": None, "router_bias": False},
            {"q_proj.lora_a": P(None, None, None), "q_proj.lora_b": P(None, None, "tensor")},
        ),
        ({"fsdp": 2, "expert": 2}, {}, {"q_proj.lora_a": P("expert", None, "fsdp")}),
        # k_proj's 6 outputs do not divide
        ({"fsdp": 4}, {}, {"q_proj.lora_b": P(None, None, "fsdp"), "k_proj.lora_b": P(None, "fsdp", None)}),
        ({"fsdp": 4}, {"r": 6}, {"q_proj.lora_a": P(None, None, "fsdp"), "k_proj.lora_b": P(None, None, None)}),
        ({"data": 4}, {}, {"q_proj.lora_a": P(None, None, None), "q_proj.router.kernel": P(None, None)}),
    ],
)
def test_an_adapter_lies_by_the_rule_read_aloud(sizes, fields, expected):
    shape = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 6}
    model = mlj.abstract_base_model(shape, dtype="bfloat16", mesh=make_mesh(sizes, devices=topology("v5e:2x2").devices))
    config = {"r": 16, "num_experts": 8, "top_k": 2, "router_bias": True, "target_modules": "all-linear", **fields}
    mlj.apply_moe_lora(model, mlj.MoeLoraConfig(**config), rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(model, mlj.MoeLoraParam)):
        name = ".".join(map(str, path[4:]))
        if name in expected:
            found = variable.get_value().sharding
            assert found.is_equivalent_to(NamedSharding(found.mesh, expected[name]), variable.ndim), (name, found.spec)
    assert expected.keys() <= {".".join(map(str, path[4:])) for path, _ in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def compiled() -> jax.stages.Compiled:
    """One row of tokens on each chip; layers as a scan, recomputed in the backward pass; the loss in four chunks."""
    mesh = make_mesh({"fsdp": CHIPS}, devices=topology("v5e:2x2").devices)
    model = mlj.abstract_base_model(LLAMA, dtype="bfloat16", scan_layers=True, mesh=mesh)
    config = mlj.MoeLoraConfig(r=16, num_experts=8, top_k=2, target_modules="all-linear")
    mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(0))
    setup = set_up(model, model.moe_lora_config, TrainSettings(batch_size=CHIPS, loss_chunk=CHUNK, steps=1), 1)
    rows = [
        jax.ShapeDtypeStruct((1, CHIPS, LENGTH), dtype, sharding=row_sharding(mesh, axis=1))
        for dtype in (jnp.int32, jnp.int32, jnp.bool)
    ]
    return setup.step.lower(setup.state, setup.frozen, Batch(*rows)).compile()


def test_no_adapter_and_no_moment_is_whole_on_a_chip(compiled):
    (state, *_), _ = compiled.input_shardings
    (shapes, *_), _ = compiled.args_info
    changed = jax.tree_util.tree_leaves_with_path((shapes.trainable, shapes.opt_state))
    where = jax.tree.leaves((state.trainable, state.opt_state))
    parts = {
        jax.tree_util.keystr(path): math.prod(leaf.shape) / math.prod(lies.shard_shape(leaf.shape))
        for (path, leaf), lies in zip(changed, where, strict=True)
        if leaf.shape  # the rest counts steps
    }
    assert len(parts) == 3 * 7 * 3 and set(parts.values()) == {CHIPS}


def test_the_table_is_not_gathered(compiled):
    """The head [1024, 32768] is, which shows that the search finds such an array."""
    gathered = set(re.findall(r"bf16\[([\d,]*)\][^=]* all-gather(?:-start)?\(", compiled.as_text()))
    assert "1024,32768" in gathered and "32768,1024" not in gathered


def test_the_head_is_gathered_once_and_logits_exist_for_a_chunk(compiled):
    """Before the loops over chunks, forwards and backwards."""
    program = read_hlo(compiled.as_text())
    gathers = [
        where
        for where, instructions in program.computations.items()
        for i in instructions
        if i.opcode.startswith("all-gather") and "bf16[1024,32768]" in i.shape
    ]
    assert gathers == [program.entry]
    arrays = set(re.findall(r"\w+\[([\d,]*)\]", compiled.as_text()))
    assert f"{CHUNK},32768" in arrays and not {f"{LENGTH},32768", f"1,{LENGTH},32768"} & arrays


def test_it_needs_what_was_measured(compiled):
    """28.9 MiB; 44.7 with bf16 logits of all tokens; 117.7 with whole adapters, a gathered table and fp32 logits too
    (64 MiB each of the last two)."""
    assert compiled.memory_analysis().temp_size_in_bytes < 33 * MIB
