"""A feed-forward block whose experts are whole blocks, and its linear layers; what they compute is in `slots`."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig
from moe_lora_jax.layers.display import Described, experts_in_words
from moe_lora_jax.layers.mixing import MoeLoraParam, init_experts
from moe_lora_jax.layers.router import Router
from moe_lora_jax.layers.shared import Shared
from moe_lora_jax.layers.slots import Slots


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
        most_kept: int | None,
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
        self.most_kept = most_kept
        self.is_last = is_last
        self.dropout = nnx.Dropout(config.lora_dropout, deterministic=True)
        self.rngs = rngs["dropout"].fork() if config.lora_dropout > 0 and is_target else nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """See the class."""
        slots = Slots.of(self.shared.get_value()[:, 0, 0], self.most_kept)
        flat = slots.flat(x)
        base = self.base_layer(slots.mix(flat) if self.is_last else x)
        if self.lora_a is None or self.lora_b is None:
            return base
        a, b = self.lora_a[...], self.lora_b[...]
        dropped = self.dropout(flat.astype(a.dtype), rngs=self.rngs)
        if self.is_last:
            return base + slots.gated_sum(dropped, a, b, self.scalings).astype(base.dtype)
        return slots.add_deltas(base, dropped, a, b, self.scalings)

    def facts(self) -> str:
        """See `display`."""
        gated = ", adds up the gated experts" if self.is_last else ""
        if self.lora_a is None or self.lora_b is None:
            return f"no experts of its own{gated}"
        words = experts_in_words(self.lora_a, self.lora_b, self.ranks, self.scalings)
        return f"{self.lora_a.shape[-1]} -> {self.lora_b.shape[-1]}; {words}{gated}"
