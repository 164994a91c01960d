"""The output head as one matrix: hidden states times it, summed in fp32."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_jax.models.quantized import QuantizedEmbed, QuantizedLinear, QuantizedWeight

Matrix = jax.Array | QuantizedWeight


def matrix_of(layer: Any) -> Matrix | None:
    """[hidden, vocab]; codes of an embedding are [vocab, hidden]. None of a layer that does more than multiply by it:
    one with an adapter."""
    if type(layer) is nnx.Embed:
        return layer.embedding[...].T
    if type(layer) is nnx.Linear and layer.bias is None:
        return layer.kernel[...]
    if type(layer) is QuantizedEmbed:
        return layer.embedding
    return layer.kernel if type(layer) is QuantizedLinear and layer.bias is None else None


def product(x: jax.Array, matrix: Matrix, *, tied: bool, dtype: Any = None) -> jax.Array:
    """x [tokens, hidden] times the matrix: [tokens, vocab].

    Operands have the matrix's dtype, sums fp32; then they are rounded to the matrix's dtype, unless `dtype` is another.
    """
    if isinstance(matrix, QuantizedWeight):
        return matrix.matmul(x, transposed=tied, dtype=dtype)
    operands = jnp.result_type(x, matrix)
    return jnp.matmul(x.astype(operands), matrix.astype(operands), preferred_element_type=dtype)
