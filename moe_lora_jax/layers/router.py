"""Routers that stand at a linear layer or a feed-forward block, and what they report."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig
from moe_lora_interop.config.in_words import gates_in_words
from moe_lora_jax.layers.display import Described
from moe_lora_jax.layers.gating import Gating, compute_gates
from moe_lora_jax.layers.mixing import MoeLoraParam
from moe_lora_jax.layers.shared import Shared, per_token, task_rows

ROUTER_STD = 0.02


class RouterOutput(NamedTuple):
    """What a router decided: `logits` z (after bias and temperature) and `gates` g, both [..., expert] fp32."""

    logits: jax.Array
    gates: jax.Array


class RouterRecord(nnx.Intermediate):
    """The variable type under which routers sow their `RouterOutput`; read it with `nnx.capture`."""


def record(module: nnx.Module, decision: RouterOutput) -> None:
    """Hands a decision to `nnx.capture`, if the call runs under it (sowing without it is deprecated)."""
    if hasattr(module, "__captures__"):
        module.sow(RouterRecord, "router_output", decision)


@jax.custom_jvp
def router_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x R at full precision: fp32 [tokens, in] and [in, logit] -> [tokens, logit].

    An ordinary matrix product, whose derivatives are written for few logits. To any order, forwards and backwards.
    """
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)


@partial(router_product.defjvp, symbolic_zeros=True)
def _router_product_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, Any]:
    (x, kernel), (dx, dkernel) = primals, tangents
    z = router_product(x, kernel)
    dz = jnp.zeros_like(z)
    if not isinstance(dx, SymbolicZero):
        dz = dz + _moved_input(dx, kernel)
    if not isinstance(dkernel, SymbolicZero):
        # transposed, this is a product [logit, tokens] [tokens, in]: XLA:CPU is six times slower at the mirrored one,
        # into which it turns this one back unless there is a barrier
        rows = jax.lax.optimization_barrier(dkernel.T)
        dz = dz + jnp.matmul(x, rows.T, precision=jax.lax.Precision.HIGHEST)
    return z, dz


@jax.jit  # so that the terms of the sum never exist, outside jit either
def _moved_input(dx: jax.Array, kernel: jax.Array) -> jax.Array:
    """dx R as a sum. Transposed, XLA adds dz R^T to the other gradients of x without a [tokens, in] for it."""
    return jnp.sum(dx[:, :, None] * kernel, axis=1)


class Router(Described, nnx.Module):
    """z = (R x + b) / temperature; gates as in `compute_gates`. Always in fp32.

    Variables: `kernel` [in, logit], N(0, 0.02^2) at init; `bias` [logit], zero; with an adaptive threshold
    tau = threshold * sigmoid(w.x + c): `threshold_kernel` [in] and `threshold_bias` [], zero. `logit` is the experts,
    times n_splits.
    """

    def __init__(self, in_features: int, sizes: ModuleConfig, *, config: MoeLoraConfig, rngs: nnx.Rngs):
        self.gating = Gating.of(config, sizes)
        self.num_experts, self.n_splits = sizes.num_experts, config.n_splits
        logits = sizes.num_experts * config.n_splits
        self.kernel = MoeLoraParam(ROUTER_STD * jax.random.normal(rngs.params(), (in_features, logits), jnp.float32))
        self.bias = MoeLoraParam(jnp.zeros(logits, jnp.float32)) if config.router_bias else None
        adaptive = config.adaptive_threshold
        self.threshold_kernel = MoeLoraParam(jnp.zeros(in_features, jnp.float32)) if adaptive else None
        self.threshold_bias = MoeLoraParam(jnp.zeros((), jnp.float32)) if adaptive else None

    def __call__(self, x: jax.Array) -> RouterOutput:
        """Routes x [tokens, in]: logits and gates [tokens, split, expert]."""
        x = x.astype(jnp.float32)
        logits = router_product(x, self.kernel[...].astype(jnp.float32))
        if self.bias is not None:
            logits = logits + self.bias[...]
        logits = (logits / self.gating.router_temperature).reshape(x.shape[0], self.n_splits, self.num_experts)
        decision = RouterOutput(logits, compute_gates(logits, self.gating, self._tau(x)))
        record(self, decision)
        return decision

    def facts(self) -> str:
        """See `display`."""
        splits = f" for each of {self.n_splits} splits" if self.n_splits > 1 else ""
        return f"{self.kernel.shape[0]} -> {self.num_experts} experts{splits}; {gates_in_words(self.gating)}"

    def _tau(self, x: jax.Array) -> jax.Array | float | None:
        if self.threshold_kernel is None or self.threshold_bias is None:
            return self.gating.threshold
        score = jnp.matmul(x, self.threshold_kernel[...], precision=jax.lax.Precision.HIGHEST)
        assert self.gating.threshold is not None, "the config requires it"
        return self.gating.threshold * jax.nn.sigmoid(score + self.threshold_bias[...])[:, None, None]


class TaskRouter(Described, nnx.Module):
    """A table of logits per task at one layer (Poly): z = T[task] / temperature.

    Variables: `task_embedding` [task, logit], N(0, 0.02^2) at init. `shared` brings the task ids.
    """

    def __init__(self, sizes: ModuleConfig, shared: Shared, *, config: MoeLoraConfig, rngs: nnx.Rngs):
        self.gating = Gating.of(config, sizes)
        self.num_experts = sizes.num_experts
        assert config.num_tasks is not None, "the config requires it"
        shape = (config.num_tasks, sizes.num_experts * config.n_splits)
        self.task_embedding = MoeLoraParam(ROUTER_STD * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.shared = shared

    def facts(self) -> str:
        """See `display`."""
        tasks = self.task_embedding.shape[0]
        return f"{tasks} tasks -> {self.num_experts} experts; {gates_in_words(self.gating)}"

    def __call__(self, x: jax.Array) -> RouterOutput:
        """Routes by task; x [tokens, in] only says how many tokens there are."""
        if self.shared.is_empty:
            raise ValueError("this adapter routes by task: call the model with task_ids=")
        rows = task_rows(self.task_embedding[...].astype(jnp.float32), self.shared.get_value())
        rows = (rows / self.gating.router_temperature).reshape(rows.shape[0], -1, self.num_experts)
        logits = per_token(rows, x.shape[0])
        decision = RouterOutput(logits, compute_gates(logits, self.gating, self.gating.threshold))
        record(self, decision)
        return decision
