"""Routers that stand at a linear layer or a feed-forward block, and what they report."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from interop.config import ModuleConfig, MoeLoraConfig
from moe_lora_jax.experts import MoeLoraParam
from moe_lora_jax.gating import Gating, compute_gates
from moe_lora_jax.shared import Shared, per_token
from moe_lora_jax.task_table import task_rows

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


class Router(nnx.Module):
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
        kernel = self.kernel[...].astype(jnp.float32)
        return self.decide(x, jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST))

    def decide(self, x: jax.Array, product: jax.Array) -> RouterOutput:
        """The same from the product R x [tokens, logit], for a caller that computed it together with another."""
        logits = product if self.bias is None else product + self.bias[...]
        logits = (logits / self.gating.router_temperature).reshape(x.shape[0], self.n_splits, self.num_experts)
        decision = RouterOutput(logits, compute_gates(logits, self.gating, self._tau(x)))
        record(self, decision)
        return decision

    def _tau(self, x: jax.Array) -> jax.Array | float | None:
        if self.threshold_kernel is None or self.threshold_bias is None:
            return self.gating.threshold
        score = jnp.matmul(x.astype(jnp.float32), self.threshold_kernel[...], precision=jax.lax.Precision.HIGHEST)
        assert self.gating.threshold is not None, "the config requires it"
        return self.gating.threshold * jax.nn.sigmoid(score + self.threshold_bias[...])[:, None, None]


class TaskRouter(nnx.Module):
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
