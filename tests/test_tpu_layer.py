"""What a TPU's own compiler makes of one layer and of one block: their cycles, temporaries, and precision."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

import moe_lora_jax as mlj
from moe_lora_jax.compiled import estimated_cycles, topology
from moe_lora_jax.models import DecoderConfig
from moe_lora_jax.models.decoder import FeedForward

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")

BF16 = jnp.bfloat16
FULL = (["f32"] * 2, ["highest"] * 2)
BLOCK = ["gate_proj", "up_proj", "down_proj"]


def compiled(function, *arguments):
    """For one v6e chip; arguments may be shapes."""
    sharding = SingleDeviceSharding(topology("v6e:1x1").devices[0])
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    return jax.jit(function).lower(*shapes).compile()


def forward_and_backward(make, x, y):
    """Of make()'s module: its output, and the gradients of its adapter and of x [tokens, in] for y's cotangent."""
    graph, adapter, rest = nnx.split(nnx.eval_shape(make), mlj.MoeLoraParam, ...)

    def function(adapter, rest, x, cotangent):
        y, vjp = jax.vjp(lambda adapter, x: nnx.merge(graph, adapter, rest, copy=True)(x), adapter, x)
        return y, *vjp(cotangent)

    return compiled(function, adapter, rest, x, y)


def layer(width, tokens, dtype=BF16, **fields):
    def make():
        config = mlj.MoeLoraConfig(**fields)
        base = nnx.Linear(width, width, use_bias=False, param_dtype=dtype, rngs=nnx.Rngs(0))
        module = mlj.MoeLoraLinear(base, width, width, config.for_module("m"), config=config, rngs=nnx.Rngs(1))
        module.train()
        return module

    x = jax.ShapeDtypeStruct((tokens, width), dtype)
    return forward_and_backward(make, x, x)


class Block(nnx.Module):
    """A feed-forward block of the width of Llama-3-8B's."""

    def __init__(self, config):
        self.config, self.mlp = config, FeedForward(config, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.mlp(x)


def block(**fields):
    sizes = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    sizes |= dict(vocab_size=256, num_hidden_layers=1, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config = DecoderConfig.from_hf(sizes)

    def make():
        return mlj.apply_moe_lora(Block(config), mlj.MoeLoraConfig(target_modules=BLOCK, **fields), rngs=nnx.Rngs(1))

    x = jax.ShapeDtypeStruct((2048, 4096), BF16)
    return forward_and_backward(make, x, x)


def cycles(program):
    return estimated_cycles(program.as_text()).total


def products(program):
    """(dtypes of the operands, precision of the operands) of every product, from the compiled text."""
    text = program.as_text()
    dtypes = dict(re.findall(r"^ *(?:ROOT )?(%[\w.\-]+) = (\w+)\[", text, re.MULTILINE))
    found = []
    for line in re.findall(r"^.* = \w+\[.* (?:convolution|dot)\(.*$", text, re.MULTILINE):
        operands = re.search(r" (?:convolution|dot)\(([^)]*)\)", line)[1].split(", ")
        precision = re.search(r"operand_precision=\{([\w,]+)\}", line)
        found.append(
            ([dtypes[o.split(" ")[-1]] for o in operands], precision[1].split(",") if precision else ["default"] * 2)
        )
    assert found
    return found


def test_a_mixture_of_linear_layers_costs_what_lora_does():
    lora, mixture = layer(4096, 4096, r=128), layer(4096, 4096, r=16, num_experts=8, top_k=2)
    assert cycles(mixture) <= 1.06 * cycles(lora)


def test_a_routed_block_costs_little_more_than_lora():
    lora, mixture = block(r=128), block(r=16, num_experts=8, top_k=2, scope="ffn")
    assert cycles(mixture) <= 1.45 * cycles(lora)
    assert mixture.memory_analysis().temp_size_in_bytes <= 2.5 * lora.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("fields", [{}, dict(lora_dropout=0.1), dict(router_jitter_noise=0.1)], ids=str)
def test_a_bf16_input_is_multiplied_as_such_and_a_jittered_one_by_the_router_in_full(fields):
    found = products(layer(256, 512, r=4, num_experts=8, top_k=2, **fields))
    wide = [product for product in found if product != (["bf16"] * 2, ["default"] * 2)]
    # a router in three pieces is exact, tests/test_joint_product.py; jittered, its input is fp32: x R, dx and dR
    assert wide == ([FULL] * 3 if "router_jitter_noise" in fields else [])
    # W0, B and both of their gradients, dx alone of W0; A and R are one, and are two where A's input has dropout
    assert len(found) - len(wide) == (11 if "lora_dropout" in fields else 8)


def small_model_step():
    """The gradient of a Llama in float32, every linear layer adapted."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=2, num_key_value_heads=1, vocab_size=512)
    sizes |= dict(num_hidden_layers=1, dtype="float32", architectures=["LlamaForCausalLM"])

    def make():
        model = mlj.CausalLM(DecoderConfig.from_hf(sizes), rngs=nnx.Rngs(0))
        config = mlj.MoeLoraConfig(r=4, num_experts=8, top_k=2, target_modules="all-linear")
        return mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(1))

    graph, adapter, rest = nnx.split(nnx.eval_shape(make), mlj.MoeLoraParam, ...)

    def loss(adapter, rest, ids):
        return jnp.sum(jnp.sin(nnx.merge(graph, adapter, rest, copy=True)(ids)))

    return compiled(jax.value_and_grad(loss), adapter, rest, jax.ShapeDtypeStruct((2, 128), jnp.int32))


def test_a_float32_model_multiplies_float32():
    assert {tuple(map(tuple, product)) for product in products(small_model_step())} == {
        (("f32",) * 2, ("highest",) * 2)
    }


def test_at_the_default_precision_only_routers_multiply_float32():
    with jax.default_matmul_precision("default"):
        found = products(small_model_step())
    # of seven routers x R, dR and dx; but the first three's x is the frozen embedding's, and needs no gradient
    assert found.count(FULL) == 7 * 3 - 3
    assert all(product[1] == ["default"] * 2 for product in found if product != FULL)
