"""From router logits to gates: one composition for every routing scheme, the same in JAX and PyTorch."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig
from moe_lora_interop.config.routing_rule import decision


class RouterOutput(NamedTuple):
    """One router's decision for every token; all of shape [..., expert], fp32 (`kept` is boolean).

    `logits` include the temperature. `gates` are the weights g of the formula in `moe_lora_interop.config`, before
    routed_scaling_factor and expert_dropout.
    """

    logits: jax.Array
    scores: jax.Array
    kept: jax.Array
    gates: jax.Array


@dataclass(frozen=True)
class Gating:
    """The routing rule of one module: what a router keeps of the config, as nnx hashes it at every compiled call."""

    top_k: int | None
    scoring_func: str
    router_temperature: float
    threshold: float | None
    adaptive_threshold: bool
    top_p: float | None
    entropy_threshold: float | None
    entropy_index: float
    entropy_eps: float
    norm_topk_prob: bool
    routed_scaling_factor: float
    routing_rule: Any

    @classmethod
    def of(cls, config: MoeLoraConfig, sizes: ModuleConfig) -> "Gating":
        fields = {name: getattr(config, name) for name in cls.__dataclass_fields__ if name != "top_k"}
        return cls(top_k=sizes.top_k, **fields)


def route(logits: jax.Array, gating: Gating, tau: jax.Array | float | None = None) -> RouterOutput:
    """Computes the gates.

        p     = softmax(z) | softmax(|z|) | sigmoid(z) | z | sparsemax(z)
        keep  = all | the top_k largest p (ties: the lower expert wins) | p >= tau
                with top_p and entropy_threshold more, as `moe_lora_interop.config` says it
        gates = softmax of log p over the kept     norm_topk_prob, no adaptive threshold, no sparsemax (whose p are 0)
              = p (minus tau if adaptive) where kept, else 0; divided by its sum if norm_topk_prob      otherwise

    The first form equals the second in exact arithmetic, but gives exact zeros as gradients where they are zero
    (renormalised top-1), which an optimizer like Adam would otherwise inflate. A token with nothing kept gets zeros.
    A registered routing decides all this itself.

    Args:
        logits: z, [..., expert], the temperature applied.
        gating: the rule.
        tau: the threshold, a number or [..., 1], or None.
    """
    if gating.routing_rule is not None:
        return _registered(logits, gating.routing_rule, gating.top_k)
    z = jnp.abs(logits) if gating.scoring_func == "abs_softmax" else logits
    is_softmax = "softmax" in gating.scoring_func
    scores = _SCORES[gating.scoring_func](z)
    if gating.top_k is not None and gating.top_k < z.shape[-1]:
        kept = jnp.any(top_k_slots(z, gating.top_k), axis=-2)
        if gating.top_p is not None:
            kept |= _within(jax.lax.stop_gradient(z), jax.lax.stop_gradient(scores), gating.top_p)
        if gating.entropy_threshold is not None:
            entropy = _entropy(jax.lax.stop_gradient(scores) + gating.entropy_eps, gating.entropy_index)
            kept |= entropy > gating.entropy_threshold
    else:
        kept = jnp.ones(z.shape, bool) if tau is None else scores >= tau
    if gating.norm_topk_prob and not gating.adaptive_threshold and gating.scoring_func != "sparsemax":
        gates = _masked_softmax(z if is_softmax else jax.nn.log_sigmoid(z), kept)  # softmax needs no log: p ~ exp(z)
    else:
        weights = scores - tau if gating.adaptive_threshold and tau is not None else scores
        gates = jnp.where(kept, weights, 0.0)
        if gating.norm_topk_prob:
            total = jnp.sum(gates, axis=-1, keepdims=True)
            gates = jnp.where(total > 0, gates / jnp.where(total > 0, total, 1.0), 0.0)
    return RouterOutput(logits, scores, kept, gates)


def _registered(logits: jax.Array, rule: Any, top_k: int | None) -> RouterOutput:
    """What a registered routing decides. Gates of a token that keeps more than top_k are nan: whole feed-forward blocks
    run for top_k experts alone, and would leave the others out."""
    scores, gates = decision(rule, "jax", logits, top_k)
    kept = gates != 0
    if top_k is not None:
        gates = jnp.where(jnp.sum(kept, axis=-1, keepdims=True) > top_k, jnp.nan, gates)
    return RouterOutput(logits, scores, kept, gates)


def sparsemax(z: jax.Array) -> jax.Array:
    """The probabilities nearest to z: max(z - t, 0), t such that their sum is 1 (arXiv:1602.02068); [..., expert].

    Expert i is above t if sum_j max(z_j - z_i, 0) < 1. Of any t the derivatives are those with these experts fixed.
    That needs no sort, whose derivative is a gather, which a mesh would compute on whole arrays.
    """
    fixed = jax.lax.stop_gradient(z)
    above = ~(jnp.sum(jnp.maximum(fixed[..., None, :] - fixed[..., None], 0), axis=-1) >= 1)  # where z is nan, p is too
    z = z - jnp.max(fixed, axis=-1, keepdims=True)
    t = (jnp.sum(jnp.where(above, z, 0.0), axis=-1, keepdims=True) - 1) / jnp.sum(above, axis=-1, keepdims=True)
    return jnp.where(z <= t, 0.0, z - t)


_SCORES = {
    "softmax": jax.nn.softmax,
    "abs_softmax": jax.nn.softmax,  # of |z|, which `route` gives it
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda z: z,
    "sparsemax": sparsemax,
}


def top_k_slots(z: jax.Array, k: int) -> jax.Array:
    """The k largest entries along the last axis, largest first, as masks: bool [..., k, expert].

    Of equal entries the first counts as larger, 0 and -0 being equal; torch.topk does not promise that.

    One maximum after the other: XLA computes `lax.top_k` on whole arrays, so on a mesh every device would first get
    the logits of all tokens. On the CPU that costs 0.3 ms instead of 0.12 at 64 experts (512 tokens, k = 2), and
    nothing beyond the noise at 8 and 16; on a TPU (v6e) 7 thousand cycles at 4,096 tokens and 8 experts.
    """
    left, slots = jnp.maximum(z, jnp.finfo(z.dtype).min), []
    for _ in range(k):
        chosen = jnp.argmax(left, axis=-1, keepdims=True) == jnp.arange(z.shape[-1])
        left = jnp.where(chosen, -jnp.inf, left)
        slots.append(chosen)
    return jnp.stack(slots, axis=-2)


def _within(z: jax.Array, p: jax.Array, limit: float) -> jax.Array:
    """Where the sum of p over all larger z (and equal ones before) and the own one is at most `limit`.

    Sorted there and back, both without a gather, which a mesh would compute on whole arrays.
    """
    places = jnp.broadcast_to(jnp.arange(z.shape[-1]), z.shape)
    _, descending, order = jax.lax.sort((-z, p, places), num_keys=1, is_stable=True)
    return jax.lax.sort((order, jnp.cumsum(descending, axis=-1) <= limit), num_keys=1)[1]


def _entropy(p: jax.Array, q: float) -> jax.Array:
    """Tsallis' entropy of order q, or Shannon's for q = 1, divided by that of equal p: [..., 1]."""
    experts = p.shape[-1]
    if q == 1:
        return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1, keepdims=True) / math.log(experts)
    return (1 - jnp.sum(p**q, axis=-1, keepdims=True)) / (1 - experts ** (1 - q))


def _masked_softmax(z: jax.Array, kept: jax.Array) -> jax.Array:
    """exp(z) / sum of the kept exp(z) where kept, else 0; zeros (not NaN) where nothing is kept."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.where(kept, z, -jnp.inf), axis=-1, keepdims=True))
    shifted = jnp.exp(jnp.where(kept, z - jnp.where(jnp.isfinite(largest), largest, 0.0), -jnp.inf))
    total = jnp.sum(shifted, axis=-1, keepdims=True)
    return jnp.where(total > 0, shifted / jnp.where(total > 0, total, 1.0), 0.0)
