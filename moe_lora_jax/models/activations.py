"""The gate activations of the feed-forward blocks, under the names that config.json uses.

Source: `ACT2FN` in transformers/activations.py@5.24.0.
"""

import functools
from collections.abc import Callable

import jax

_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
_gelu_erf = functools.partial(jax.nn.gelu, approximate=False)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": _gelu_erf,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
}
