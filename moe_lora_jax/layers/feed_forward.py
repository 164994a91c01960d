"""Experts that are whole feed-forward blocks (MixLoRA): FFN(x) = sum_e g_e FFN_e(x), every W of FFN_e = W0 + s B_e A_e.

The block's own code runs once, on activations with a leading slot axis: its first linear layers add one delta per slot
to one base product, its last one multiplies by the gates and sums *before* its base product, which is exact because
that layer is linear. So no base product is ever computed per expert. With top-k routing the slots are the k experts
that each token chose; otherwise they are all experts.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig
from moe_lora_jax.layers.display import Described, experts_in_words
from moe_lora_jax.layers.gating import top_k_slots
from moe_lora_jax.layers.mixing import MoeLoraParam, gated_sum, init_experts
from moe_lora_jax.layers.router import Router
from moe_lora_jax.layers.shared import Shared


class MoeLoraFeedForward(Described, nnx.Module):
    """Routes the block's input x [..., in] and runs the block, whose linear layers are `SlotLinear`s.

    Args:
        base_layer: the block, with its layers already replaced.
        in_features: width of x.
        sizes: experts and top_k of the block (`config.for_module(path of the block)`).
        shared: the variable through which the layers get the gates.

    Variables: `router`.
    """

    def __init__(
        self,
        base_layer: nnx.Module,
        in_features: int,
        sizes: ModuleConfig,
        shared: Shared,
        *,
        config: MoeLoraConfig,
        rngs: nnx.Rngs,
    ):
        self.base_layer = base_layer
        self.router = Router(in_features, sizes, config=config, rngs=rngs)
        self.shared = shared

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out]."""
        flat = x.reshape(-1, x.shape[-1])
        self.shared.set_value(self.router.weights(self.router(flat).gates)[:, None])
        out = self.base_layer(flat)
        self.shared.clear()
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def facts(self) -> str:
        """See `display`."""
        return f"{self.router.num_experts} experts, each a whole feed-forward block"


class SlotLinear(Described, nnx.Module):
    """One linear layer of a routed block: x [tokens, in] or [slot, tokens, in] -> [slot, tokens, out], or, for the
    block's last layer, the gated sum [tokens, out].

    Variables: `lora_a` [expert, rank, in], `lora_b` [expert, rank, out]; none if the layer is not a target itself.
    """

    def __init__(
        self,
        base_layer: nnx.Module,
        in_features: int,
        out_features: int,
        sizes: ModuleConfig,
        shared: Shared,
        *,
        config: MoeLoraConfig,
        top_k: int | None,
        is_last: bool,
        is_target: bool = True,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.base_layer = base_layer
        a, b = init_experts(
            sizes, in_features, out_features, zero_b=config.init_lora_weights, param_dtype=param_dtype, rngs=rngs
        )
        self.lora_a = nnx.data(MoeLoraParam(a) if is_target else None)
        self.lora_b = nnx.data(MoeLoraParam(b) if is_target else None)
        self.shared = shared
        self.ranks, self.scalings = sizes.ranks, sizes.scalings
        self.top_k = None if top_k is None or top_k >= sizes.num_experts else top_k
        self.is_last = is_last
        self.dropout = nnx.Dropout(config.lora_dropout, deterministic=True)
        self.rngs = rngs["dropout"].fork() if config.lora_dropout > 0 and is_target else nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """See the class."""
        gates = self.shared.get_value()[:, 0, 0]  # [tokens, expert]
        chosen = self._chosen(gates)  # [slot, tokens, expert]
        if self.is_last:
            return self._gated_sum(x, gates, chosen)
        base = self.base_layer(x)
        if self.lora_a is None or self.lora_b is None:
            return base
        a, b = self.lora_a[...], self.lora_b[...]
        hidden = self._hidden(x, a) * jnp.asarray(self.scalings, a.dtype)[:, None]
        if self.top_k is None:
            hidden = jnp.broadcast_to(hidden, (*hidden.shape[:-2], b.shape[0], b.shape[1]))
            form = "ter,ero->eto" if x.ndim == 2 else "eter,ero->eto"
            delta = jnp.einsum(form, hidden, b)
            return base + delta.astype(base.dtype)
        outputs = []  # one by one: along a slot axis a training step took 1.4 times as long (benchmarks/RESULTS.md)
        for slot, mask in enumerate(chosen.astype(a.dtype)):
            base_s, hidden_s = (base, hidden) if x.ndim == 2 else (base[slot], hidden[slot])
            outputs.append(base_s + gated_sum(hidden_s, mask, b).astype(base.dtype))
        return jnp.stack(outputs)

    def facts(self) -> str:
        """See `display`."""
        gated = ", adds up the gated experts" if self.is_last else ""
        if self.lora_a is None or self.lora_b is None:
            return f"no experts of its own{gated}"
        words = experts_in_words(self.lora_a, self.lora_b, self.ranks, self.scalings)
        return f"{self.lora_a.shape[-1]} -> {self.lora_b.shape[-1]}; {words}{gated}"

    def _gated_sum(self, x: jax.Array, gates: jax.Array, chosen: jax.Array) -> jax.Array:
        """W0 (sum_s g_s x_s) + sum_s g_s s_e B_e A_e x_s, e the expert in slot s."""
        slots = jnp.broadcast_to(x, (chosen.shape[0], *x.shape[-2:]))
        weights = chosen * gates  # [slot, tokens, expert]
        base = self.base_layer(self._mixed(slots, jnp.sum(weights, axis=-1)))
        if self.lora_a is None or self.lora_b is None:
            return base
        a, b = self.lora_a[...], self.lora_b[...]
        if self.top_k is None and a.shape[0] == b.shape[0]:  # slot e is expert e: no expert sees another's activations
            dropped = self.dropout(slots.astype(a.dtype), rngs=self.rngs)
            code = jnp.einsum("eti,eri->ter", dropped, a) * gates[..., None]
        elif self.top_k is None:
            hidden = self._hidden(slots, a)  # [slot, tokens, 1, rank]
            code = jnp.einsum("ster,ste->ter", jnp.broadcast_to(hidden, (*hidden.shape[:2], *b.shape[:2])), weights)
        else:
            code = sum(self._hidden(x_s, a) * w[:, :, None] for x_s, w in zip(slots, weights, strict=True))
        delta = gated_sum(code.astype(a.dtype), jnp.broadcast_to(jnp.asarray(self.scalings), gates.shape), b)
        return base + delta.astype(base.dtype)

    def _mixed(self, slots: jax.Array, share: jax.Array) -> jax.Array:
        """sum_s share_s x_s, for slots [slot, tokens, in] and share [slot, tokens]: [tokens, in]."""
        if self.top_k is None:
            return jnp.einsum("sti,st->ti", slots, share.astype(slots.dtype))
        # summed in fp32, the dtype of the share
        return sum(x * g[:, None] for x, g in zip(slots, share, strict=True)).astype(slots.dtype)  # type: ignore[union-attr]

    def _hidden(self, x: jax.Array, a: jax.Array) -> jax.Array:
        """A x: [..., expert or 1, rank]."""
        x = self.dropout(x.astype(a.dtype), rngs=self.rngs)
        return (x @ a.reshape(-1, a.shape[-1]).T).reshape(*x.shape[:-1], *a.shape[:2])

    def _chosen(self, gates: jax.Array) -> jax.Array:
        """Which expert is in which slot of a token, as 0 and 1: [slot, tokens, expert]."""
        experts = gates.shape[-1]
        if self.top_k is None:
            return jnp.broadcast_to(jnp.eye(experts, dtype=gates.dtype)[:, None, :], (experts, *gates.shape))
        slots = top_k_slots(jax.lax.stop_gradient(gates), self.top_k)
        return jnp.moveaxis(slots, -2, 0).astype(gates.dtype)
