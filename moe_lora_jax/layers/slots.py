"""Experts that are whole feed-forward blocks (MixLoRA, arXiv:2404.15159): the block's code runs once, on slots.

    FFN(x) = sum_e g_e FFN_e(x), every W of FFN_e being W0 + s_e B_e A_e

The block's first layers add one delta per slot to one base product; its last layer multiplies by the gates and sums
*before* its base product, which is exact because that layer is linear. So no base product is ever computed per expert.
With top-k routing the slots are the k experts that each token chose; otherwise they are all experts, in order.

Chosen slots are computed one by one: along a slot axis a training step took 1.4 times as long (benchmarks/RESULTS.md).
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_lora_jax.layers.gating import top_k_slots
from moe_lora_jax.layers.mixing import gated_sum, scaled


class Slots(NamedTuple):
    """What a block's router decided for its tokens.

    gates   [tokens, expert], fp32, times routed_scaling_factor
    chosen  [slot, tokens, expert], one 1 per slot and token; None: slot e is expert e
    """

    gates: jax.Array
    chosen: jax.Array | None

    @classmethod
    def of(cls, gates: jax.Array, top_k: int | None) -> "Slots":
        """Slots for the k largest gates of every token, whatever their signs; of equal ones the first."""
        if top_k is None or top_k >= gates.shape[-1]:
            return cls(gates, None)
        chosen = top_k_slots(jnp.abs(jax.lax.stop_gradient(gates)), top_k)
        return cls(gates, jnp.moveaxis(chosen, -2, 0).astype(gates.dtype))

    def flat(self, x: jax.Array) -> jax.Array:
        """[(slot,) tokens, size] -> [slot or 1, tokens, size]."""
        return x if x.ndim == 3 else x[None]

    def add_deltas(
        self, base: jax.Array, x: jax.Array, a: jax.Array, b: jax.Array, scalings: tuple[float, ...]
    ) -> jax.Array:
        """base + s_e B_e A_e x, e the expert in each slot: [slot, tokens, out].

        Args:
            base: [(slot,) tokens, out].
            x: [slot or 1, tokens, in].
        """
        if self.chosen is None:
            hidden = (x @ a.mT) * jnp.asarray(scalings, a.dtype)[:, None, None]
            return base + (hidden @ b).astype(base.dtype)
        deltas = (gated_sum(code, scaled(one, scalings), b) for code, one in _codes(x, a, self.chosen))
        bases = base if base.ndim == 3 else [base] * len(self.chosen)
        return jnp.stack([base_s + delta.astype(base.dtype) for base_s, delta in zip(bases, deltas, strict=True)])

    def mix(self, x: jax.Array) -> jax.Array:
        """sum_s g_s x_s: x [slot or 1, tokens, in] -> [tokens, in]."""
        if self.chosen is None:
            slots = jnp.broadcast_to(x, (self.gates.shape[-1], *x.shape[1:]))
            return jnp.einsum("sti,ts->ti", slots, self.gates.astype(x.dtype))
        weights = jnp.sum(self.chosen * self.gates, axis=-1)
        slots = jnp.broadcast_to(x, (len(weights), *x.shape[1:]))
        return sum(x_s * g[:, None] for x_s, g in zip(slots, weights, strict=True)).astype(x.dtype)  # summed in fp32

    def gated_sum(self, x: jax.Array, a: jax.Array, b: jax.Array, scalings: tuple[float, ...]) -> jax.Array:
        """sum_s g_s s_e B_e A_e x_s, e the expert in slot s: x [slot or 1, tokens, in] -> [tokens, out]."""
        if self.chosen is None:  # slot e is expert e: no expert sees another's activations
            hidden = jnp.moveaxis(x @ a.mT, 0, 1)
        else:
            masked = (code * one[..., None] for code, one in _codes(x, a, self.chosen))
            hidden = sum(masked, start=jnp.zeros((), a.dtype))
        return gated_sum(hidden, scaled(self.gates, scalings), b)


def _codes(x: jax.Array, a: jax.Array, chosen: jax.Array) -> Iterator[tuple[jax.Array, jax.Array]]:
    """For each slot A x of every expert, [tokens, expert or 1, rank], and the one expert, [tokens, expert]."""
    codes = [(x_s @ a.reshape(-1, a.shape[-1]).T).reshape(-1, *a.shape[:2]) for x_s in x]
    return zip(codes * len(chosen) if len(codes) == 1 else codes, chosen.astype(a.dtype), strict=True)
