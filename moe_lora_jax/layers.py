"""A mixture of LoRA experts around one linear layer."""

import jax
import jax.numpy as jnp
from flax import nnx

from interop.config import ModuleConfig, MoeLoraConfig
from moe_lora_jax.experts import MoeLoraParam, gated_sum, init_experts
from moe_lora_jax.router import Router, RouterOutput, RouterRecord


class MoeLoraLinear(nnx.Module):
    """y = W0 x + sum_e g_e(x) s_e B_e A_e x, with s_e = lora_alpha_e / r_e g from the router (1 for one expert).

    Two products carry all experts: A as [expert*rank, in] and B as [expert*rank, out]; between them the hidden code is
    multiplied by the gates. The router's rows join the first product when both read the same fp32 input.

    Args:
        base_layer: the frozen layer W0; called with x unchanged.
        in_features, out_features: its sizes.
        sizes: the module's experts, ranks and alphas (`config.for_module(path)`).
        config: the adapter's config.
        param_dtype: storage dtype of A and B; the router is always fp32. The delta is computed in this dtype and added
            in the dtype of the base layer's output.
        rngs: streams "params" (initial values) and "dropout" (training only).

    Variables: `lora_a` [expert, rank, in] (expert = 1 when shared), `lora_b` [expert, rank, out]; `router` unless there
    is one expert.
    """

    def __init__(
        self,
        base_layer: nnx.Module,
        in_features: int,
        out_features: int,
        sizes: ModuleConfig,
        *,
        config: MoeLoraConfig,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.base_layer = base_layer
        a, b = init_experts(
            sizes, in_features, out_features, zero_b=config.init_lora_weights, param_dtype=param_dtype, rngs=rngs
        )
        self.lora_a, self.lora_b = MoeLoraParam(a), MoeLoraParam(b)
        self.router = Router(in_features, sizes, config=config, rngs=rngs) if sizes.has_router else None
        self.scalings = sizes.scalings
        self.router_jitter_noise = config.router_jitter_noise
        self.dropout = nnx.Dropout(config.lora_dropout, deterministic=True)
        self.expert_dropout = nnx.Dropout(config.expert_dropout, deterministic=True)
        self.deterministic = True  # flipped by model.train() / model.eval()
        random = config.lora_dropout > 0 or config.expert_dropout > 0 or config.router_jitter_noise > 0
        self.rngs = rngs["dropout"].fork() if random else nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out]."""
        base = self.base_layer(x)
        delta = self.delta(x.reshape(-1, x.shape[-1]))
        return base + delta.reshape(base.shape).astype(base.dtype)

    def delta(self, x: jax.Array) -> jax.Array:
        """What the adapter adds, for x [tokens, in]: [tokens, out] in the adapter's dtype."""
        a, b = self.lora_a[...], self.lora_b[...]
        scalings = jnp.asarray(self.scalings, jnp.float32)
        flat_a = a.reshape(-1, a.shape[-1])
        experts_x = self.dropout(x.astype(a.dtype), rngs=self.rngs)
        if self.router is None:
            hidden = experts_x @ flat_a.T
            weights = jnp.broadcast_to(scalings, (x.shape[0], 1))
        else:
            hidden, decision = self._hidden_and_router(x, experts_x, flat_a)
            self._record(decision)
            weights = self.expert_dropout(decision.gates, rngs=self.rngs) * scalings
        return gated_sum(hidden.reshape(x.shape[0], *a.shape[:2]), weights, b)

    def _hidden_and_router(
        self, x: jax.Array, experts_x: jax.Array, flat_a: jax.Array
    ) -> tuple[jax.Array, RouterOutput]:
        assert self.router is not None
        jitter = 0.0 if self.deterministic else self.router_jitter_noise
        same_input = jitter == 0.0 and (self.deterministic or self.dropout.rate == 0.0)
        if same_input and x.dtype == flat_a.dtype == jnp.float32:
            joined = x @ jnp.concatenate([flat_a, self.router.kernel[...].T]).T
            hidden, product = joined[:, : flat_a.shape[0]], joined[:, flat_a.shape[0] :]
            return hidden, self.router.decide(x, product)
        router_x = x.astype(jnp.float32)
        if jitter > 0.0:
            assert self.rngs is not None
            router_x = router_x * jax.random.uniform(self.rngs(), x.shape, jnp.float32, 1.0 - jitter, 1.0 + jitter)
        return experts_x @ flat_a.T, self.router(router_x)

    def _record(self, decision: RouterOutput) -> None:
        if hasattr(self, "__captures__"):  # sowing outside nnx.capture is deprecated
            self.sow(RouterRecord, "router_output", decision)
