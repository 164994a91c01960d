"""The router of one module: a linear map from the input to one logit per expert, and the gates computed from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from interop.config import ModuleConfig, MoeLoraConfig
from moe_lora_jax.experts import MoeLoraParam
from moe_lora_jax.gating import Gating, compute_gates


class RouterOutput(NamedTuple):
    """What a router decided: `logits` z (after bias and temperature) and `gates` g, both [..., expert] fp32."""

    logits: jax.Array
    gates: jax.Array


class RouterRecord(nnx.Intermediate):
    """The variable type under which layers sow their `RouterOutput`; read it with `nnx.capture`."""


class Router(nnx.Module):
    """z = (R x + b) / temperature; gates as in `compute_gates`. Always in fp32.

    Variables: `kernel` [in, expert], N(0, 0.02^2) at init; `bias` [expert], zero; with an adaptive threshold
    tau = threshold * sigmoid(w.x + c): `threshold_kernel` [in] and `threshold_bias` [], zero.
    """

    def __init__(self, in_features: int, sizes: ModuleConfig, *, config: MoeLoraConfig, rngs: nnx.Rngs):
        self.gating = Gating.of(config, sizes)
        self.kernel = MoeLoraParam(
            0.02 * jax.random.normal(rngs.params(), (in_features, sizes.num_experts), jnp.float32)
        )
        self.bias = MoeLoraParam(jnp.zeros(sizes.num_experts, jnp.float32)) if config.router_bias else None
        adaptive = config.adaptive_threshold
        self.threshold_kernel = MoeLoraParam(jnp.zeros(in_features, jnp.float32)) if adaptive else None
        self.threshold_bias = MoeLoraParam(jnp.zeros((), jnp.float32)) if adaptive else None

    def __call__(self, x: jax.Array) -> RouterOutput:
        """Routes x [tokens, in]."""
        x = x.astype(jnp.float32)
        kernel = self.kernel[...].astype(jnp.float32)
        return self.decide(x, jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST))

    def decide(self, x: jax.Array, product: jax.Array) -> RouterOutput:
        """The same from the product R x [tokens, expert], for a caller that computed it together with another."""
        logits = product if self.bias is None else product + self.bias[...]
        logits = logits / self.gating.router_temperature
        return RouterOutput(logits, compute_gates(logits, self.gating, self._tau(x)))

    def _tau(self, x: jax.Array) -> jax.Array | float | None:
        if self.threshold_kernel is None or self.threshold_bias is None:
            return self.gating.threshold
        score = jnp.matmul(x.astype(jnp.float32), self.threshold_kernel[...], precision=jax.lax.Precision.HIGHEST)
        assert self.gating.threshold is not None, "the config requires it"
        return self.gating.threshold * jax.nn.sigmoid(score + self.threshold_bias[...])[:, None]
