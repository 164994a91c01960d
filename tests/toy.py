"""A toy NNX model with the module names of a transformer: a list of blocks, two kinds of layer in each, and a head."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

IN, HIDDEN, VOCAB = 6, 8, 10


def fast_rngs(seed):
    """Random streams of the generator that compiles in a fifth of the time."""
    return nnx.Rngs(jax.random.key(seed, impl="unsafe_rbg"))


def linear(n_in, n_out, *, use_bias, dtype, rngs):
    def random(key, shape, dtype):  # numpy has nothing to compile
        seed = np.asarray(jax.random.key_data(key)).sum()
        return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * shape[0] ** -0.5, dtype)

    kind = dict(dtype=dtype, param_dtype=dtype, kernel_init=random, bias_init=random)
    return nnx.Linear(n_in, n_out, use_bias=use_bias, rngs=rngs, **kind)


class Mlp(nnx.Module):
    def __init__(self, hidden, **kind):
        self.up_proj = linear(IN, hidden, **kind)
        self.down_proj = linear(hidden, IN, **kind)

    def __call__(self, x):
        return self.down_proj(nnx.relu(self.up_proj(x)))


class Block(nnx.Module):
    def __init__(self, hidden, **kind):
        self.q_proj = linear(IN, IN, **kind)
        self.mlp = Mlp(hidden, **kind)

    def __call__(self, x):
        return x + self.mlp(x + self.q_proj(x))


class Toy(nnx.Module):
    """model.layers.{i}.{q_proj, mlp.up_proj, mlp.down_proj} and lm_head."""

    def __init__(self, layers=2, hidden=HIDDEN, *, use_bias=False, dtype=jnp.float32, seed=0):
        rngs = fast_rngs(seed)
        kind = dict(use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(hidden, **kind) for _ in range(layers)])
        self.lm_head = linear(IN, VOCAB, **{**kind, "use_bias": False})

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


KINDS = ("q_proj", "mlp.up_proj", "mlp.down_proj")
MODULES = sorted(f"layers.{i}.{kind}" for i in range(2) for kind in KINDS)


@partial(jax.jit, static_argnums=0)
def _run(graph, state, x):
    return nnx.merge(graph, state)(x)


def run(model):
    """The model's output on fixed inputs, compiled once per structure: eager mode compiles every operation."""
    return np.asarray(_run(*nnx.split(model), inputs(dtype=model.lm_head.dtype)))


def inputs(seed=1, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (2, 3, IN), dtype)


def leaves(model, kind=...):
    """{path: numpy array} of a model's variables, random keys among them."""
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {".".join(map(str, path)): _numpy(variable[...]) for path, variable in flat}


def _numpy(value):
    is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(value) if is_key else value)


def assert_same_leaves(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name
