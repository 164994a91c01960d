"""Experts that are whole feed-forward blocks (MixLoRA, arXiv:2404.15159): the block's code runs once for each slot.

    FFN(x) = sum_e g_e FFN_e(x), every W of FFN_e being W0 + s_e B_e A_e

The block's first layers compute one base product and one A x, in the first run, and add a delta in each; its last layer
multiplies by the gates and adds up over the runs *before* its base product, which is exact because that layer is
linear. So no base product is ever computed per expert, and no array has an axis for slots: along one a training step
took 1.4 times as long on a CPU (benchmarks/RESULTS.md), and on a TPU whole stacks of activations were copied.

With top-k routing the slots are the k experts that each token chose. Otherwise all experts are one run, along an axis.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_lora_jax.layers.gating import top_k_slots
from moe_lora_jax.layers.mixing import scaled, spread


class Run(NamedTuple):
    """One run of a block's code, for its layers.

    gates   [tokens, expert], fp32, times routed_scaling_factor
    chosen  [run, tokens, expert], one 1 per run and token: of this run and those that follow; None: slot e is expert e
    """

    gates: jax.Array
    chosen: jax.Array | None

    @property
    def is_final(self) -> bool:
        return self.chosen is None or len(self.chosen) == 1

    @property
    def one(self) -> jax.Array:
        """The expert that each token has in this run: [tokens, expert], one 1 per token."""
        assert self.chosen is not None
        return self.chosen[0]

    @property
    def weight(self) -> jax.Array:
        """Its gate, [tokens, 1]."""
        return jnp.sum(self.one * self.gates, axis=-1, keepdims=True)

    def of_one(self, codes: jax.Array, rank: int, scalings: tuple[float, ...] | None = None) -> jax.Array:
        """Codes [tokens, (expert rank)] or, shared, [tokens, rank]: times s_e for the run's expert e, else 0."""
        one = self.one if scalings is None else scaled(self.one, scalings)
        return spread(codes, one.astype(codes.dtype), rank)


def runs(gates: jax.Array, most_kept: int | None) -> list[Run]:
    """A run for each of the k largest gates of every token, whatever their signs, the largest first (of equal ones the
    first); or one run.

    Args:
        gates: [tokens, expert].
        most_kept: k; None for all experts.
    """
    if most_kept is None or most_kept >= gates.shape[-1]:
        return [Run(gates, None)]
    chosen = top_k_slots(jnp.abs(jax.lax.stop_gradient(gates)), most_kept)
    chosen = jnp.moveaxis(chosen, -2, 0).astype(gates.dtype)
    return [Run(gates, chosen[number:]) for number in range(most_kept)]
