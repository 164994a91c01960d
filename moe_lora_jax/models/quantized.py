"""Frozen base weights in 8 or 4 bits (QLoRA, arXiv:2305.14314): W = scale * code, one scale for a block of inputs.

The library qwix (`pip install 'moe-lora-jax[quant]'`) makes the codes and turns them back into numbers. That happens
where a weight is used, and once more for the gradient of its input; no copy in full precision is kept.
"""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_jax.layers.linear_maps import LikeLinear

Kind = Literal["int8", "int4", "nf4"]


class Codes(nnx.Variable):
    """The codes of a quantised weight, in its shape; int8, or 4-bit integers that JAX packs in pairs."""


class Scales(nnx.Variable):
    """Their scales, one for each block, bfloat16."""


class QuantizedWeight(nnx.Module):
    """A matrix as codes and scales, blocks lying along `axis`."""

    def __init__(self, weight: jax.Array, kind: Kind, block_size: int, axis: int):
        codes, scales = _quantized(weight, kind, block_size, axis)
        self.codes, self.scales = Codes(codes), Scales(scales)
        self.kind, self.dtype = kind, weight.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows of the matrix: [..., columns]."""
        return self._dequantized(self.codes[...][ids], self.scales[...][ids])

    def matmul(self, x: jax.Array, *, transposed: bool = False, dtype: Any = None) -> jax.Array:
        """x W, or x W^T, rounded to `dtype`; None: to W's. Only the codes are kept for the gradient of x."""

        @jax.checkpoint
        def product(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
            weight = self._dequantized(codes, scales)
            return jnp.matmul(x, weight.T if transposed else weight, preferred_element_type=dtype)

        return product(x, self.codes[...], self.scales[...])

    def _dequantized(self, codes: jax.Array, scales: jax.Array) -> jax.Array:
        wide = scales.astype(jnp.float32).reshape(-1, scales.shape[-1])
        flat = codes.reshape(-1, codes.shape[-1])
        table = partial(_by_table, kind=self.kind)
        if self.kind == "nf4":
            values = jax.lax.platform_dependent(flat, wide, cpu=table, default=_by_bits)
        else:
            values = table(flat, wide)
        return values.astype(self.dtype).reshape(codes.shape)


class QuantizedLinear(LikeLinear):
    """`nnx.Linear` with a quantised kernel: y = x W + b, x [..., in]."""

    def __init__(self, layer: nnx.Linear, kind: Kind, block_size: int):
        self.kernel = QuantizedWeight(layer.kernel[...], kind, block_size, axis=0)
        self.bias = layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.kernel.matmul(x)
        return y if self.bias is None else y + self.bias[...]


class QuantizedEmbed(nnx.Module):
    """`nnx.Embed` with a quantised table [vocab, features]; `attend` is the tied output head."""

    def __init__(self, layer: nnx.Embed, kind: Kind, block_size: int):
        self.embedding = QuantizedWeight(layer.embedding[...], kind, block_size, axis=1)
        self.num_embeddings, self.features = layer.num_embeddings, layer.features

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding.rows(ids)

    def attend(self, x: jax.Array) -> jax.Array:
        return self.embedding.matmul(x, transposed=True)


def quantize_base(model: nnx.Module, kind: Kind, *, block_size: int = 32, embeddings: bool = True) -> nnx.Module:
    """Replaces the weights of every `nnx.Linear` and `nnx.Embed` of a base model by 8- or 4-bit ones, in place.

    One layer after the other; each weight is freed as soon as its codes exist. Apply the adapter afterwards: it keeps
    its own dtype, is saved as always, and loads on the unquantised base.

    Args:
        model: a base model without an adapter.
        kind: "int8", "int4" (equal steps) or "nf4" (steps for normally distributed weights, QLoRA's).
        block_size: inputs with one scale; must divide every layer's. 32 costs half a bit a weight, 64 a quarter.
        embeddings: whether to quantise embeddings too; with tied embeddings these are also the head.

    Raises:
        ImportError: qwix is not installed.
        CheckpointError: the model has an adapter.
        ConfigError: an unknown kind, a block size that does not fit (every layer is listed), or no layer to quantise.
            The model is left as it was.
    """
    from moe_lora_jax.tree import has_adapter, modules, replace_module

    _qwix()
    if has_adapter(model):
        raise CheckpointError("the model has an adapter: quantise the base first, then apply or load it")
    if kind not in get_args(Kind):
        raise ConfigError("cannot quantise", [f"kind: found {kind!r}, expected one of {', '.join(get_args(Kind))}"])
    kinds = (nnx.Linear, nnx.Embed) if embeddings else (nnx.Linear,)
    found = [(path, layer) for path, layer in modules(model) if isinstance(layer, kinds)]
    blocked = {path: layer.in_features if isinstance(layer, nnx.Linear) else layer.features for path, layer in found}
    problems = [
        f"{path}: has {size} inputs, expected a multiple of block_size {block_size}"
        for path, size in blocked.items()
        if block_size < 1 or size % block_size
    ]
    if problems or not found:
        raise ConfigError("cannot quantise", problems or ["found no nnx.Linear or nnx.Embed in the model"])
    paths = [path for path, _ in found]
    del found  # it would keep all weights in memory
    for path in paths:
        layer = dict(modules(model))[path]
        quantized = QuantizedLinear if isinstance(layer, nnx.Linear) else QuantizedEmbed
        replace_module(model, path, quantized(layer, kind, block_size))
    return model


@partial(jax.jit, static_argnames=("kind", "block_size", "axis"))
def _quantized(weight: jax.Array, kind: Kind, block_size: int, axis: int) -> tuple[jax.Array, jax.Array]:
    """Codes and scales."""
    wide = weight.astype(jnp.float32)
    stored = _qwix().quantize(wide, kind, channelwise_axes=(1 - axis,), tiled_axes={axis: block_size})
    return stored.qvalue, stored.scale.astype(jnp.bfloat16)


def _by_table(codes: jax.Array, scales: jax.Array, kind: Kind) -> jax.Array:
    """scale * number of each code, fp32, as qwix computes it; nf4's numbers are looked up."""
    qwix = _qwix()
    return qwix.dequantize(qwix.QArray(codes, scales, qtype=kind))


def _by_bits(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The same for nf4, its numbers chosen bit by bit. XLA:TPU computes a lookup in a table of 16 in nine times the
    cycles, with whole fp32 copies of the weight; XLA:CPU is faster with the table."""
    with jax.ensure_compile_time_eval():
        numbers = [*_by_table(jnp.arange(16, dtype=codes.dtype)[:, None], jnp.ones((1, 1)), "nf4")[:, 0]]
    wide = codes.astype(jnp.int32)
    for bit in range(4):
        is_set = (wide >> bit) & 1 == 1
        numbers = [jnp.where(is_set, one, zero) for zero, one in zip(numbers[::2], numbers[1::2], strict=True)]
    (rows, columns), (row_blocks, column_blocks) = codes.shape, scales.shape
    blocks = numbers[0].reshape(row_blocks, rows // row_blocks, column_blocks, columns // column_blocks)
    return (blocks * scales[:, None, :, None]).reshape(codes.shape)


def _qwix() -> Any:
    try:
        import qwix
    except ModuleNotFoundError as error:
        if error.name != "qwix":
            raise
        raise ImportError("quantised base models need qwix: pip install 'moe-lora-jax[quant]'") from error
    return qwix
