"""The stacked LoRA experts of one linear layer: their variables, and the products that carry all of them at once."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_interop.config.adapter_config import ModuleConfig


class MoeLoraParam(nnx.LoRAParam):
    """Every trainable variable of an adapter (experts and router). `nnx.state(model, MoeLoraParam)` is the adapter.

    Select with this type: the filter `nnx.Param` also catches the frozen base weights.
    """


def init_experts(
    sizes: ModuleConfig, in_features: int, out_features: int, *, zero_b: bool, param_dtype: jnp.dtype, rngs: nnx.Rngs
) -> tuple[jax.Array, jax.Array]:
    """A [expert, rank, in] ~ U(-1/sqrt(in), 1/sqrt(in)) as in PEFT's LoRA, and B [expert, rank, out] = 0.

    With `zero_b` false B ~ N(0, 1/rank): an adapter that is visibly not the identity, for tests. Rows beyond an
    expert's own rank are zero in both, and stay zero in training, because each is the other's gradient.
    """
    experts_a = 1 if sizes.shared_lora_A else sizes.num_experts
    bound = in_features**-0.5
    a = jax.random.uniform(rngs.params(), (experts_a, sizes.rank, in_features), param_dtype, -bound, bound)
    shape_b = (sizes.num_experts, sizes.rank, out_features)
    b = jnp.zeros(shape_b, param_dtype)
    if not zero_b:
        b = jax.random.normal(rngs.params(), shape_b, param_dtype) * sizes.rank**-0.5
    if min(sizes.ranks) < sizes.rank:
        used = jnp.arange(sizes.rank) < jnp.asarray(sizes.ranks)[:, None]
        a, b = (jnp.where(used[:, :, None], factor, 0.0) for factor in (a, b))
    return a.astype(param_dtype), b.astype(param_dtype)


def gated_sum(hidden: jax.Array, weights: jax.Array, b: jax.Array) -> jax.Array:
    """sum_e weights_e B_e hidden_e, as one product over the joined (expert rank) axis.

    Args:
        hidden: A x, [tokens, expert, rank]; the expert axis is 1 when A is shared.
        weights: gate times scaling, [tokens, expert].
        b: [expert, rank, out].

    Returns:
        [tokens, out]; no [tokens, expert, out] array ever exists.
    """
    gated = hidden * weights[:, :, None].astype(hidden.dtype)
    return gated.reshape(hidden.shape[0], b.shape[0] * b.shape[1]) @ b.reshape(-1, b.shape[-1])


def mixed_factors(x: jax.Array, gates: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """x A B with mixed factors (Poly, MHR): A = [sum_e g_qe A_e,q for q in splits] over the input, B over the output.

    Args:
        x: [tokens, in].
        gates: [tokens, split, expert].
        a: [expert, rank, in]; `in` is cut into splits, and so is `out`.
        b: [expert, rank, out].

    Returns:
        [tokens, out]. One batched product over splits for each factor; no mixed matrix per token ever exists.
    """
    tokens, splits, experts = gates.shape
    rank = a.shape[1]
    x_parts = x.reshape(tokens, splits, -1)
    a_parts = a.reshape(experts, rank, splits, -1)
    hidden = jnp.einsum("tqi,erqi->tqer", x_parts, a_parts)
    code = jnp.einsum("tqer,tqe->tr", hidden, gates.astype(hidden.dtype))
    gated = gates.astype(code.dtype)[..., None] * code[:, None, None, :]
    b_parts = b.reshape(experts, rank, splits, -1)
    return jnp.einsum("tqer,erqo->tqo", gated, b_parts).reshape(tokens, -1)


def scaled(gates: jax.Array, scalings: tuple[float, ...]) -> jax.Array:
    """g_e s_e, in the dtype of the gates."""
    return gates * jnp.asarray(scalings, gates.dtype)


def spread(hidden: jax.Array, weights: jax.Array, rank: int) -> jax.Array:
    """Each expert's code times its weight: [tokens, (expert rank)].

    The joined axis stays joined, as on TPUs [tokens, expert, rank] is another layout.

    Args:
        hidden: A x, [tokens, (expert rank)]; [tokens, rank] when A is shared.
        weights: [tokens, expert].
    """
    experts = weights.shape[1]
    if hidden.shape[1] == rank:
        hidden = jnp.tile(hidden, experts)
    return hidden * jnp.repeat(weights, rank, axis=1)
