"""A Llama in NNX with names and layers unlike Hugging Face's (no test of its own): LinearGeneral for q, k and v, Einsum
for the output, a class of its own in the feed-forward block, layers called blocks."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from moe_lora_jax import LinearMap, ModelSpec


class Dense(nnx.Module):
    """A layer class that Flax does not know: weight [out, in]."""

    def __init__(self, n_in, n_out):
        self.weight = nnx.Param(jnp.zeros((n_out, n_in)))

    def __call__(self, x):
        return x @ self.weight[...].T


SPEC = ModelSpec(
    names={
        "blocks.{l}.attention.query": "model.layers.{l}.self_attn.q_proj",
        "blocks.{l}.attention.key": "model.layers.{l}.self_attn.k_proj",
        "blocks.{l}.attention.value": "model.layers.{l}.self_attn.v_proj",
        "blocks.{l}.attention.out": "model.layers.{l}.self_attn.o_proj",
        "blocks.{l}.ffn.{p}": "model.layers.{l}.mlp.{p}_proj",
        "head": "lm_head",
    },
    layers={Dense: lambda layer: LinearMap(layer.weight.shape[1:], layer.weight.shape[:1])},
)


def norm(x, weight):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * weight


class Attention(nnx.Module):
    def __init__(self, d, heads, groups, size, rngs):
        kind = dict(use_bias=False, rngs=rngs)
        self.query = nnx.LinearGeneral(d, (heads, size), **kind)
        self.key = nnx.LinearGeneral(d, (groups, size), **kind)
        self.value = nnx.LinearGeneral(d, (groups, size), **kind)
        self.out = nnx.Einsum("BTNH,NHD->BTD", (heads, size, d), rngs=rngs)

    def __call__(self, x):
        angle = jnp.arange(x.shape[1])[:, None] * 1e4 ** -(jnp.arange(0, self.size, 2) / self.size)
        cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]

        def rotated(x):
            a, b = jnp.split(x, 2, -1)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        q, k, v = rotated(self.query(x)), rotated(self.key(x)), self.value(x)
        times = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, times, 2), jnp.repeat(v, times, 2)
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * self.size**-0.5
        scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
        return self.out(jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v))

    @property
    def size(self):
        return self.out.kernel_shape[1]  # of the layer, or of what has taken its place


class FeedForward(nnx.Module):
    def __init__(self, d, hidden):
        self.gate, self.up, self.down = Dense(d, hidden), Dense(d, hidden), Dense(hidden, d)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, d, hidden, heads, groups, size, rngs):
        self.attention, self.ffn = Attention(d, heads, groups, size, rngs), FeedForward(d, hidden)
        self.norm_1, self.norm_2 = nnx.Param(jnp.ones(d)), nnx.Param(jnp.ones(d))

    def __call__(self, x):
        x = x + self.attention(norm(x, self.norm_1[...]))
        return x + self.ffn(norm(x, self.norm_2[...]))


class Llama(nnx.Module):
    def __init__(self, layers=2, vocab=97, d=32, hidden=48, heads=4, groups=2, size=8):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Param(jnp.zeros((vocab, d)))
        self.blocks = nnx.List([Block(d, hidden, heads, groups, size, rngs) for _ in range(layers)])
        self.norm = nnx.Param(jnp.ones(d))
        self.head = nnx.Linear(d, vocab, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed[...][ids]
        for block in self.blocks:
            x = block(x)
        return self.head(norm(x, self.norm[...]))


def load(directory):
    """The Llama that transformers saved there, in these names and shapes."""
    stored, model = load_file(directory / "model.safetensors"), Llama()

    def put(variable, name, order=None):
        tensor = stored.pop(f"{name}.weight")
        variable[...] = jnp.asarray(np.reshape(tensor if order is None else tensor.T, variable.shape))

    put(model.embed, "model.embed_tokens")
    put(model.norm, "model.norm")
    put(model.head.kernel, "lm_head", "transposed")
    for i, block in enumerate(model.blocks):
        name = f"model.layers.{i}"
        for ours, theirs in dict(query="q", key="k", value="v", out="o").items():
            put(getattr(block.attention, ours).kernel, f"{name}.self_attn.{theirs}_proj", "transposed")
        for part in ("gate", "up", "down"):
            put(getattr(block.ffn, part).weight, f"{name}.mlp.{part}_proj")
        put(block.norm_1, f"{name}.input_layernorm")
        put(block.norm_2, f"{name}.post_attention_layernorm")
    assert not stored
    return model
