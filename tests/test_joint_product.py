"""A and the router in one product of bf16, as on TPUs and GPUs, here on the CPU; against float64 in numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from moe_lora_jax import MoeLoraParam
from moe_lora_jax.layers import joint_product as module
from moe_lora_jax.layers.joint_product import bf16_product, exact_product, joint_product, pieces
from tests.test_layers import IN, KINDS, OUT, expected_gates, inputs, make_layer, routed

EXACT = 3e-7  # of the scale: what products of fp32 at the highest precision keep
TOKENS, WIDTH, ROWS, LOGITS = 64, 256, 12, 8


@pytest.fixture
def one_product(monkeypatch):
    """The program of a machine that is no CPU."""
    monkeypatch.setattr(module, "platform_dependent", lambda *arrays, cpu, default: default(*arrays))


def bf16(array):
    """Rounded to bf16, in float64."""
    return np.asarray(array, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def as64(array):
    return np.asarray(array, np.float64)


def close(found, expected, of_scale):
    assert np.abs(as64(found) - expected).max(initial=0) <= of_scale * np.abs(expected).max(initial=1e-30)


def arrays(seed=0):
    """x, A, R, dh, dz: the router's numbers span some powers of two."""
    rng = np.random.default_rng(seed)
    normal = [rng.normal(size=shape) for shape in ((TOKENS, WIDTH), (ROWS, WIDTH), (WIDTH, LOGITS))]
    normal += [rng.normal(size=(TOKENS, ROWS)), rng.normal(size=(TOKENS, LOGITS))]
    normal[2] *= 2.0 ** rng.integers(-2, 3, (WIDTH, 1))
    x, *rest = (jnp.asarray(array, jnp.float32) for array in normal)
    return x.astype(jnp.bfloat16), *rest


def test_three_pieces_are_the_whole_number():
    values = np.random.default_rng(0).normal(size=10_000) * 2.0 ** np.random.default_rng(1).integers(-60, 60, 10_000)
    values = np.append(values.astype(np.float32), np.float32([0, 1, -1, 3.0e38, 1 / 3]))
    found = pieces(jnp.asarray(values))
    assert {piece.dtype for piece in found} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(sum(as64(piece) for piece in found), values.astype(np.float64))
    compiled = jax.jit(pieces)(jnp.asarray(values))  # no simplification may take the rounding away
    np.testing.assert_array_equal(sum(as64(piece) for piece in compiled), values.astype(np.float64))


def test_logits_are_exact_and_codes_are_those_of_a_rounded_a(one_product):
    x, a, kernel, _, _ = arrays()
    hidden, logits = jax.jit(joint_product)(x, a, kernel)
    assert hidden.dtype == logits.dtype == jnp.float32
    close(logits, as64(x) @ as64(kernel), EXACT)
    close(hidden, as64(x) @ bf16(a).T, EXACT)
    close(exact_product(x, kernel), as64(x) @ as64(kernel), EXACT)
    close(bf16_product(x, a), as64(x) @ bf16(a).T, EXACT)


def test_gradients(one_product):
    x, a, kernel, dh, dz = arrays()
    dx, da, dkernel = jax.jit(lambda *c: jax.vjp(joint_product, x, a, kernel)[1](c))(dh, dz)
    assert [g.dtype for g in (dx, da, dkernel)] == [jnp.bfloat16, jnp.float32, jnp.float32]
    close(dkernel, as64(x).T @ as64(dz), EXACT)
    close(da, bf16(dh).T @ as64(x), EXACT)
    close(dx, bf16(bf16(dh) @ bf16(a) + as64(dz) @ as64(kernel).T), 2.0**-8)  # one rounding of the result
    _, _, alone = jax.vjp(joint_product, x, jnp.zeros((0, WIDTH)), kernel)[1]((dh[:, :0], dz))
    close(alone, as64(x).T @ as64(dz), EXACT)


def test_the_routers_part_of_the_inputs_gradient_is_finer_than_bf16(one_product):
    x, _, kernel, _, dz = arrays()
    wide = x.astype(jnp.float32)  # so that dx is not rounded at its end
    dx, _, _ = jax.vjp(joint_product, wide, jnp.zeros((0, WIDTH)), kernel)[1]((jnp.zeros((TOKENS, 0)), dz))
    close(dx, as64(dz) @ as64(kernel).T, 2.0**-15)


def test_under_vmap_scan_remat_and_a_second_derivative(one_product):
    x, a, kernel, _, _ = arrays()
    batch = jnp.stack([x, x[::-1] * 2])

    def loss(a, kernel, x):
        hidden, logits = joint_product(x, a, kernel)
        return jnp.sum(jnp.sin(hidden)) + jnp.sum(jnp.sin(logits))

    one_by_one = [jax.grad(loss, (0, 1, 2))(a, kernel, rows) for rows in batch]
    together = jax.vmap(jax.grad(loss, (0, 1, 2)), in_axes=(None, None, 0))(a, kernel, batch)
    for which in range(3):
        close(together[which], np.stack([as64(grads[which]) for grads in one_by_one]), 1e-6 if which < 2 else 2.0**-8)

    def summed(a, kernel):
        def body(carry, rows):
            return carry + jax.checkpoint(loss)(a, kernel, rows), None

        return jax.lax.scan(body, jnp.zeros(()), batch)[0]

    for found, *parts in zip(jax.jit(jax.grad(summed, (0, 1)))(a, kernel), *one_by_one, strict=False):
        close(found, sum(map(as64, parts)), 1e-5)

    x, kernel = x[:3, :4], kernel[:4, :3]
    second = jax.hessian(lambda kernel: jnp.sum(jnp.sin(exact_product(x, kernel))))(kernel)
    expected = -np.einsum("ti,tl,tj,lm->iljm", as64(x), np.sin(as64(x) @ as64(kernel)), as64(x), np.eye(3))
    close(second, expected, 1e-5)


def test_on_a_cpu_both_products_are_those_of_fp32():
    x, a, kernel, dh, dz = arrays()
    hidden, logits = joint_product(x, a, kernel)
    close(hidden, as64(x) @ as64(a).T, EXACT)
    close(logits, as64(x) @ as64(kernel), EXACT)
    dx, da, dkernel = jax.vjp(joint_product, x, a, kernel)[1]((dh, dz))
    close(da, as64(dh).T @ as64(x), EXACT)
    close(dkernel, as64(x).T @ as64(dz), EXACT)
    close(dx, as64(dh) @ as64(a) + as64(dz) @ as64(kernel).T, 2.0**-7)  # each part is rounded, then their sum


# --- in a layer -------------------------------------------------------------------------------------------------------


def rounded_delta(layer, config, x):
    """sum_e (g_e s_e A_e x) B_e, the factors of each product rounded to bf16; x [tokens, in] in float64."""
    a, b, out = bf16(layer.lora_a[...]), bf16(layer.lora_b[...]), []
    for token in x:
        gates = config.routed_scaling_factor * expected_gates(layer, config, token)
        codes = [
            g * s * (a[min(e, len(a) - 1)] @ token) for e, (g, s) in enumerate(zip(gates, layer.scalings, strict=True))
        ]
        out.append(sum(bf16(code) @ b[e] for e, code in enumerate(codes)))
    return np.array(out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_routes_in_fp32_and_multiplies_bf16(kind, one_product):
    layer, config = make_layer(base_dtype=jnp.bfloat16, **KINDS[kind])
    x = jnp.asarray(inputs(), jnp.bfloat16)
    if config.num_experts > 1:
        gates = np.array([expected_gates(layer, config, token) for token in as64(x)])
        np.testing.assert_allclose(routed(layer, x)[1].gates, gates, rtol=1e-5, atol=1e-6)
    expected = rounded_delta(layer, config, as64(x))
    delta = layer.delta(x)
    assert delta.dtype == jnp.float32
    # a gated code at the middle between two bf16 numbers may go either way: half a step of one of them
    assert np.median(np.abs(delta - expected)) < 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(delta, expected, atol=2.0**-8 * np.abs(expected).max())


@pytest.mark.parametrize(
    "fields", [dict(mix="weights", n_splits=2), dict(lora_dropout=0.5), dict(router_jitter_noise=0.1)], ids=str
)
def test_what_stands_between_an_input_and_its_readers_is_heard(fields, one_product):
    """Dropout is A's, jitter the router's, and mixed factors have no hidden code: nothing is shared, or left out."""
    layer, _ = make_layer(base_dtype=jnp.bfloat16, n_in=8, n_out=4, **fields)
    other, _ = make_layer(base_dtype=jnp.bfloat16, n_in=8, n_out=4, **fields)
    x = jnp.asarray(inputs((64, 8)), jnp.bfloat16)
    is_random = "mix" not in fields
    if is_random:
        layer.train()
    (_, found), (_, quiet) = routed(layer, x), routed(other, x)
    assert np.allclose(found.logits, quiet.logits, atol=1e-6) == ("router_jitter_noise" not in fields)
    assert np.allclose(layer.delta(x), other.delta(x), atol=1e-3) == (not is_random)


def test_with_the_highest_precision_a_layer_multiplies_fp32_and_has_derivatives_forwards(one_product):
    layer, _ = make_layer(base_dtype=jnp.bfloat16, top_k=2)
    wide, _ = make_layer(top_k=2)  # the same numbers around an fp32 base
    x = jnp.asarray(inputs(), jnp.bfloat16)
    graph, adapter, rest = nnx.split(layer, MoeLoraParam, ...)

    def delta(adapter):
        return nnx.merge(graph, adapter, rest, copy=True).delta(x)

    tangents = jax.tree.map(jnp.ones_like, adapter)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(layer.delta(x), wide.delta(x.astype(jnp.float32)), rtol=1e-6, atol=1e-6)
        check_grads(delta, (adapter,), order=1, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(delta, (adapter,), (tangents,))
    assert layer(x).shape == (7, OUT) and x.shape == (7, IN)
