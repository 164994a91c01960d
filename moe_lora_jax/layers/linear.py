"""A mixture of LoRA experts around one linear layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig
from moe_lora_jax.layers.display import Described, experts_in_words
from moe_lora_jax.layers.joint_product import bf16_product, is_bf16_product, joint_product
from moe_lora_jax.layers.linear_maps import LinearMap
from moe_lora_jax.layers.mixing import MoeLoraParam, gated_sum, init_experts, mixed_factors, scaled, spread
from moe_lora_jax.layers.router import Router, TaskRouter
from moe_lora_jax.layers.shared import Shared, per_token


class LayerWrapper(nnx.Module):
    """In the place of `base_layer`. Sizes and settings of that layer can be read here too, as some models do."""

    base_layer: nnx.Module

    def __getattr__(self, name: str) -> Any:
        """What is not a weight of the base layer. To multiply by a weight from outside would leave the adapter out."""
        if not name.startswith("_") and "base_layer" in vars(self):
            value = getattr(self.base_layer, name, None)
            if value is not None and not callable(value) and not isinstance(value, nnx.Variable | jax.Array):
                return value
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}; weights are at its base_layer")


class MoeLoraLinear(Described, LayerWrapper):
    """y = W0 x + sum_e g_e(x) s_e B_e A_e x, s_e = lora_alpha_e / r_e, g from the router (1 for one expert).

    Two products carry all experts: A as [expert*rank, in] and B as [expert*rank, out]; between them the hidden code is
    multiplied by the gates.

    Args:
        base_layer: the frozen layer W0; called with what the mixture is called with.
        in_features: width of its input.
        out_features: width of its output.
        sizes: the module's experts, ranks and alphas (`config.for_module(path)`).
        config: the adapter's config.
        shared: where the gates (scope "model") or the task ids come from; None with a router of its own.
        layer_index: this module's place in a layerwise router.
        linear_map: which axes are `in` and `out`, where they are not the last ones.
        param_dtype: storage dtype of A and B; the router is always fp32. The delta is computed in this dtype and added
            in the dtype of the base layer's output.
        rngs: streams "params" (initial values) and "dropout" (training only).

    Variables: `lora_a` [expert, rank, in] (expert = 1 when shared), `lora_b` [expert, rank, out]; `router` unless there
    is one expert or the gates are shared.
    """

    def __init__(
        self,
        base_layer: nnx.Module,
        in_features: int,
        out_features: int,
        sizes: ModuleConfig,
        *,
        config: MoeLoraConfig,
        shared: Shared | None = None,
        layer_index: int = 0,
        linear_map: LinearMap | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.base_layer = base_layer
        self.linear_map = linear_map or LinearMap((in_features,), (out_features,))
        a, b = init_experts(
            sizes, in_features, out_features, zero_b=config.init_lora_weights, param_dtype=param_dtype, rngs=rngs
        )
        self.lora_a, self.lora_b = MoeLoraParam(a), MoeLoraParam(b)
        self.reads_codes = config.router_input == "expert_activations"
        router: Router | TaskRouter | None = None
        if sizes.has_router and config.scope == "linear":
            if config.router_input != "task":
                router = Router(a[..., 0].size if self.reads_codes else in_features, sizes, config=config, rngs=rngs)
            else:
                assert shared is not None, "brings the task ids"
                router = TaskRouter(sizes, shared, config=config, rngs=rngs)
        self.router = nnx.data(router)
        self.shared = shared if config.scope == "model" else None
        self.routed = sizes.has_router
        self.layer_index = layer_index
        self.mix = config.mix if sizes.has_router else "outputs"
        self.ranks, self.scalings = sizes.ranks, sizes.scalings
        self.dropout = nnx.Dropout(config.lora_dropout, deterministic=True)
        self.rngs = rngs["dropout"].fork() if config.lora_dropout > 0 else nnx.data(None)

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """x [..., in] -> [..., out]; further arguments are the base layer's."""
        base = self.base_layer(x, *args, **kwargs)
        if self.shared is not None and self.shared.is_empty:
            return base  # the first pass of a model router, which runs without the adapter
        delta = self.delta(self.linear_map.flatten(x))
        return base + self.linear_map.restore(delta, base.shape).astype(base.dtype)

    def facts(self) -> str:
        """See `display`."""
        words = experts_in_words(self.lora_a, self.lora_b, self.ranks, self.scalings)
        gates = "; gates from the model's router" if self.routed and self.shared is not None else ""
        mixed = ", factors mixed before the product" if self.mix == "weights" else ""
        return f"{self.lora_a.shape[-1]} -> {self.lora_b.shape[-1]}; {words}{mixed}{gates}"

    def delta(self, x: jax.Array) -> jax.Array:
        """What the adapter adds, for x [tokens, in]: [tokens, out] in the adapter's dtype."""
        a, b = self.lora_a[...], self.lora_b[...]
        if self.mix == "outputs" and is_bf16_product(x, a):
            return self._bf16_delta(x, a, b)
        dropped = self.dropout(x.astype(a.dtype), rngs=self.rngs)
        if self.mix == "weights":
            return mixed_factors(dropped, self._gates(x), a, b) * jnp.asarray(self.scalings[0], a.dtype)
        codes = dropped @ a.reshape(-1, a.shape[-1]).T
        gates = self._gates(jax.nn.relu(codes) if self.reads_codes else x)
        hidden = codes.reshape(x.shape[0], *a.shape[:2])
        return gated_sum(hidden, scaled(gates[:, 0], self.scalings), b)

    def _bf16_delta(self, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """The delta by products of bf16 that are summed in fp32; one for A and the router, if both read x as it is."""
        rows, router = a.reshape(-1, a.shape[-1]), self.router
        is_dropping = self.dropout.rate > 0 and not self.dropout.deterministic
        same_input = not (self.reads_codes or is_dropping)
        if isinstance(router, Router) and same_input and not router.is_jittering:
            hidden, product = joint_product(x, rows, router.columns())
            gates = router.weights(router.from_product(product, x).gates)
        else:
            hidden = bf16_product(self.dropout(x.astype(a.dtype), rngs=self.rngs), rows)
            gates = self._gates(jax.nn.relu(hidden) if self.reads_codes else x)
        weights = scaled(gates[:, 0], self.scalings)
        return bf16_product(spread(hidden, weights, b.shape[1]), b.reshape(-1, b.shape[-1]).T).astype(a.dtype)

    def _gates(self, x: jax.Array) -> jax.Array:
        """Their weights, [tokens, split, expert], from wherever the router of this layer stands; x is what it reads."""
        if not self.routed:
            return jnp.ones((x.shape[0], 1, 1), jnp.float32)
        if self.shared is not None:  # the model's router has weighted them already
            gates = self.shared.get_value()
            return per_token(gates[:, min(self.layer_index, gates.shape[1] - 1)], x.shape[0])
        assert self.router is not None
        return self.router.weights(per_token(self.router(x).gates, x.shape[0]))
