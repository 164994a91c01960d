"""A feed-forward block whose experts are whole blocks, and its linear layers; what they compute is in `slots`."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig
from moe_lora_jax.layers.display import Described, experts_in_words
from moe_lora_jax.layers.joint_product import adapter_product
from moe_lora_jax.layers.mixing import MoeLoraParam, gated_sum, init_experts, scaled, spread
from moe_lora_jax.layers.router import Router
from moe_lora_jax.layers.shared import Shared
from moe_lora_jax.layers.slots import Run, runs


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
        self.most_kept = sizes.most_kept

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out]."""
        flat = x.reshape(-1, x.shape[-1])
        for run in runs(self.router.weights(self.router(flat).gates)[:, 0], self.most_kept):
            self.shared.set_value(run)
            out = self.base_layer(flat)
        self.shared.clear()
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def facts(self) -> str:
        """See `display`."""
        return f"{self.router.num_experts} experts, each a whole feed-forward block"


class SlotLinear(Described, nnx.Module):
    """One linear layer of a routed block, called once in each of the block's runs (see `slots`).

    x [tokens, in] or [slot, tokens, in] -> [slot, tokens, out], or, for the block's last layer, the gated sum
    [tokens, out]: in its final run, zeros before. A run has one slot, or one for each expert.

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
        self.kept = Shared.empty()
        self.out_features = out_features
        self.ranks, self.scalings = sizes.ranks, sizes.scalings
        self.is_last = is_last
        self.dropout = nnx.Dropout(config.lora_dropout, deterministic=True)
        self.rngs = rngs["dropout"].fork() if config.lora_dropout > 0 and is_target else nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """See the class."""
        run: Run = self.shared.get_value()
        if run.chosen is None:
            return self._all_experts(x, run.gates)
        out = self._last(x, run) if self.is_last else self._one_expert(x, run)
        if run.is_final:
            self.kept.clear()
        return out

    def facts(self) -> str:
        """See `display`."""
        gated = ", adds up the gated experts" if self.is_last else ""
        if self.lora_a is None or self.lora_b is None:
            return f"no experts of its own{gated}"
        words = experts_in_words(self.lora_a, self.lora_b, self.ranks, self.scalings)
        return f"{self.lora_a.shape[-1]} -> {self.lora_b.shape[-1]}; {words}{gated}"

    def _one_expert(self, x: jax.Array, run: Run) -> jax.Array:
        """W0 x + s_e B_e A_e x, e the run's expert. What is alike in all runs is computed once."""
        flat = x.reshape(x.shape[-2:])
        if x.ndim == 3:
            base, codes = self.base_layer(flat), self._codes(flat)
        elif self.kept.is_empty:
            base, codes = self.base_layer(flat), self._codes(flat)
            self.kept.set_value((base, codes))
        else:
            base, codes = self.kept.get_value()
        if codes is None or self.lora_b is None:
            return base.reshape(*x.shape[:-1], base.shape[-1])
        delta = self._up(run.of_one(codes, self.lora_b.shape[1], self.scalings), flat)
        return (base + delta.astype(base.dtype))[None]

    def _last(self, x: jax.Array, run: Run) -> jax.Array:
        """sum_s g_s (W0 + s_e B_e A_e) x_s over all runs s, in the final one: [tokens, out]."""
        flat = x.reshape(x.shape[-2:])
        codes, mixed = self._codes(flat), flat * run.weight  # summed in fp32
        if codes is not None and self.lora_b is not None:
            codes = run.of_one(codes, self.lora_b.shape[1])
        if not self.kept.is_empty:
            earlier, earlier_codes = self.kept.get_value()
            mixed, codes = earlier + mixed, None if codes is None else earlier_codes + codes
        if not run.is_final:
            self.kept.set_value((mixed, codes))
            return jnp.zeros((flat.shape[0], self.out_features), x.dtype)
        base = self.base_layer(mixed.astype(x.dtype))
        if codes is None or self.lora_b is None:
            return base
        weights = scaled(run.gates, self.scalings).astype(codes.dtype)
        delta = self._up(spread(codes, weights, self.lora_b.shape[1]), flat)
        return base + delta.astype(base.dtype)

    def _codes(self, x: jax.Array) -> jax.Array | None:
        """A x of every expert, [tokens, (expert rank)]; of one, if they share it."""
        if self.lora_a is None:
            return None
        a = self.lora_a[...]
        dropped = self.dropout(x.astype(a.dtype), rngs=self.rngs)
        return adapter_product(x, a)(dropped, a.reshape(-1, a.shape[-1]))

    def _up(self, codes: jax.Array, x: jax.Array) -> jax.Array:
        """B of codes [tokens, (expert rank)] that were made of x."""
        assert self.lora_b is not None
        b = self.lora_b[...]
        return adapter_product(x, b)(codes, b.reshape(-1, b.shape[-1]).T)

    def _all_experts(self, x: jax.Array, gates: jax.Array) -> jax.Array:
        """The same for all experts at once: slot e is expert e, and none sees another's activations."""
        slots = x if x.ndim == 3 else x[None]
        if self.is_last:
            slots = jnp.broadcast_to(slots, (gates.shape[-1], *slots.shape[1:]))
            base = self.base_layer(jnp.einsum("sti,ts->ti", slots, gates.astype(x.dtype)))
        else:
            base = self.base_layer(x)
        if self.lora_a is None or self.lora_b is None:
            return base
        a, b = self.lora_a[...], self.lora_b[...]
        codes = self.dropout(slots.astype(a.dtype), rngs=self.rngs) @ a.mT
        if self.is_last:
            delta = gated_sum(jnp.moveaxis(codes, 0, 1), scaled(gates, self.scalings), b)
        else:
            delta = (codes * jnp.asarray(self.scalings, a.dtype)[:, None, None]) @ b
        return base + delta.astype(base.dtype)
