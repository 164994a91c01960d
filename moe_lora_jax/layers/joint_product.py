"""What A and a router make of the same input: two products in fp32, or one of bf16 that is exact for the router.

A matrix unit multiplies bf16 and adds in fp32, and at the default precision that is all that a TPU does. It suffices
for A; a router chooses by its logits, which must not be blurred. But any fp32 number is the sum of three bf16 numbers,
R = R1 + R2 + R3, and a bf16 input needs no second piece:

    x [A^T | R1 | R2 | R3] = [x A^T | x R1 | x R2 | x R3],        x R = x R1 + x R2 + x R3

so that the router costs three columns per logit beside A's, where a product of its own in fp32 reads x six times.
The same holds for the gradients, with the logits' cotangent dz in three pieces:

    [dh | dz1 | dz2 | dz3]^T x = [dA | dR1 | dR2 | dR3],          dR = dR1 + dR2 + dR3
    dx = [dh | dz1 | dz1 | dz2] [A | R1^T | R2^T | R1^T]          (terms below 2^-16 of dx, which is bf16, left out)

A CPU computes the two products in fp32, as ever.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.lax import platform_dependent

BF16, FP32 = jnp.bfloat16, jnp.float32
HIGHEST = jax.lax.Precision.HIGHEST


def is_bf16_product(x: jax.Array, a: jax.Array) -> bool:
    """Whether A's product with x is one of bf16 on a TPU or a GPU.

    With a bf16 input, unless A is float16, or `jax.default_matmul_precision` asks for more than the default.
    """
    by_default = jax.default_matmul_precision.value in (None, "default", "fastest", "bfloat16")
    return by_default and x.dtype == BF16 and a.dtype in (BF16, FP32)


@jax.custom_vjp
def joint_product(x: jax.Array, a: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x A^T and x R, both summed in fp32; A is rounded to bf16, but for CPUs, and R never.

    Differentiable backwards to any order, and forwards inside of that (`jax.hessian`).

    Args:
        x: [tokens, in]. Rounded to bf16, but for CPUs: with an R it must be bf16 already.
        a: A, [rows, in].
        kernel: R, fp32 [in, logit].

    Returns:
        fp32 [tokens, rows] and [tokens, logit].
    """
    return _forward(x, a, kernel)[0]


def _forward(
    x: jax.Array, a: jax.Array, kernel: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    return platform_dependent(x, a, kernel, cpu=_two_products, default=_one_product), (x, a, kernel)


def _backward(saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    return platform_dependent(*saved, *cotangents, cpu=_two_products_backward, default=_one_product_backward)


joint_product.defvjp(_forward, _backward)


def bf16_product(x: jax.Array, a: jax.Array) -> jax.Array:
    """x A^T, fp32 [tokens, rows], both rounded to bf16, but for CPUs; see `joint_product`."""
    return joint_product(x, a, jnp.zeros((a.shape[1], 0)))[0]


def adapter_product(x: jax.Array, factor: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """How a factor (A or B) of an adapter with input x multiplies: the product of [tokens, in] and [rows, in]."""
    return bf16_product if is_bf16_product(x, factor) else _plain_product


def exact_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x R as in fp32, [tokens, logit], for any x and an fp32 R."""
    if is_bf16_product(x, kernel):
        return joint_product(x, jnp.zeros((0, x.shape[1])), kernel)[1]
    return router_product(x.astype(FP32), kernel)


# --- one product of bf16 ----------------------------------------------------------------------------------------------


def pieces(values: jax.Array) -> list[jax.Array]:
    """Three bf16 arrays whose sum is the fp32 one, to its 24 bits."""
    found: list[jax.Array] = []
    for _ in range(3):
        rounded = jax.lax.reduce_precision(values, 8, 7)  # a cast and back would be taken for nothing
        found.append(rounded.astype(BF16))
        values = values - rounded
    return found


def _one_product(x: jax.Array, a: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = a.shape[0]
    joined = _dot(x, jnp.concatenate([a.astype(BF16), *pieces(kernel.T)]), 1, 1)
    return joined[:, :rows], _sum(jnp.split(joined[:, rows:], 3, axis=1))


def _one_product_backward(
    x: jax.Array, a: jax.Array, kernel: jax.Array, dh: jax.Array, dz: jax.Array
) -> tuple[jax.Array, ...]:
    rows, dh = a.shape[0], dh.astype(BF16)
    z1, z2, z3 = pieces(dz)
    r1, r2, _ = pieces(kernel.T)
    da_dr = _dot(jnp.concatenate([dh, z1, z2, z3], axis=1), x, 0, 0)
    dx = _dot(jnp.concatenate([dh, z1, z1, z2], axis=1), jnp.concatenate([a.astype(BF16), r1, r2, r1]), 1, 0)
    return dx.astype(x.dtype), da_dr[:rows].astype(a.dtype), _sum(jnp.split(da_dr[rows:], 3)).T


def _dot(left: jax.Array, right: jax.Array, left_axis: int, right_axis: int) -> jax.Array:
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left.astype(BF16), right.astype(BF16), axes, preferred_element_type=FP32)


def _sum(parts: list[jax.Array]) -> jax.Array:
    """The small ones first."""
    first, second, third = parts
    return first + (second + third)


# --- two products in fp32 ---------------------------------------------------------------------------------------------


def _plain_product(x: jax.Array, a: jax.Array) -> jax.Array:
    return x.astype(a.dtype) @ a.T


def _two_products(x: jax.Array, a: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _plain_product(x, a).astype(FP32), router_product(x.astype(FP32), kernel)


def _two_products_backward(
    x: jax.Array, a: jax.Array, kernel: jax.Array, dh: jax.Array, dz: jax.Array
) -> tuple[jax.Array, ...]:
    return jax.vjp(_two_products, x, a, kernel)[1]((dh, dz))


@jax.custom_jvp
def router_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x R at full precision: fp32 [tokens, in] and [in, logit] -> [tokens, logit].

    An ordinary matrix product, whose derivatives are written for few logits. To any order, forwards and backwards.
    """
    return jnp.matmul(x, kernel, precision=HIGHEST)


@partial(router_product.defjvp, symbolic_zeros=True)
def _router_product_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, Any]:
    (x, kernel), (dx, dkernel) = primals, tangents
    z = router_product(x, kernel)
    dz = jnp.zeros_like(z)
    if not isinstance(dx, SymbolicZero):
        dz = dz + _moved_input(dx, kernel)
    if not isinstance(dkernel, SymbolicZero):
        # transposed, this is a product [logit, tokens] [tokens, in]: XLA:CPU is six times slower at the mirrored one,
        # into which it turns this one back unless there is a barrier; XLA:TPU makes the same program of both
        rows = jax.lax.optimization_barrier(dkernel.T)
        dz = dz + jnp.matmul(x, rows.T, precision=HIGHEST)
    return z, dz


@jax.jit  # so that the terms of the sum never exist, outside jit either
def _moved_input(dx: jax.Array, kernel: jax.Array) -> jax.Array:
    """dx R, on a CPU as a sum: transposed, XLA:CPU adds dz R^T to x's other gradients without a [tokens, in] for it.

    XLA:TPU would keep the sum away from the matrix unit: two thirds of a layer's cycles.
    """

    def summed(dx: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(dx[:, :, None] * kernel, axis=1)

    return platform_dependent(dx, kernel, cpu=summed, default=partial(jnp.matmul, precision=HIGHEST))
