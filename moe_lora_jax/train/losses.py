"""The training loss: masked next-token cross-entropy, and two auxiliary terms on the routers."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from interop.config import MoeLoraConfig
from moe_lora_jax.gating import top_k_slots
from moe_lora_jax.router import RouterOutput


class TokenLoss(NamedTuple):
    """A mean over counted tokens (fp32, nats), and how many they were: what exact accumulation needs."""

    mean: jax.Array
    counted_tokens: jax.Array


def next_token_loss(logits: jax.Array, input_ids: jax.Array, loss_mask: jax.Array) -> TokenLoss:
    """Mean of -log softmax(logits[:, t-1])[input_ids[:, t]] over the tokens t that are counted, in fp32.

    Args:
        logits: [batch, seq, vocab], any float dtype.
        input_ids: [batch, seq] integers.
        loss_mask: [batch, seq], true where the token is a target. The first token of a row has no prediction and never
            counts.

    Returns:
        The mean (0 if nothing counts) and the number of counted tokens.
    """
    scores = logits[:, :-1].astype(jnp.float32)
    targets, counted = input_ids[:, 1:], loss_mask[:, 1:].astype(jnp.float32)
    target_scores = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(scores, axis=-1) - target_scores
    count = jnp.sum(counted)
    return TokenLoss(jnp.sum(jnp.where(counted > 0, nll, 0.0)) / jnp.maximum(count, 1.0), count)


def load_balancing_loss(
    router: Mapping[str, RouterOutput], config: MoeLoraConfig, attention_mask: jax.Array | None = None
) -> jax.Array:
    """Mean over the routed modules of L_m = E sum_e f_e P_e: 1 (times k for top-k) when experts are used equally.

    P_e is the mean over real tokens of the router's probability of e: softmax(z), or the scores divided by their sum.
    With top-k, f_e is (tokens that choose e) / tokens, so sum_e f_e = k, exactly as in Mixtral (transformers'
    `load_balancing_loss_func`, for one layer: it pools the layers' tokens where this takes the mean of the layers);
    only P carries gradient. With dense or threshold routing f_e is the mean gate (before routed_scaling_factor), which
    carries gradient too.
    Source: Switch Transformer, arXiv:2101.03961, eq. 4-6.

    Args:
        router: {module path: RouterOutput, both fields [batch, seq, expert] or [batch, seq, split, expert]}, from
            `model(..., return_router=True)`.
        config: the model's adapter config, for each module's top_k and the scoring function.
        attention_mask: [batch, seq], nonzero for real tokens; None counts all.

    Returns:
        A scalar, fp32; 0 when no module has a router.
    """
    losses = []
    for module, (logits, gates) in router.items():
        top_k = config.for_module(module).top_k
        z = jnp.abs(logits) if config.scoring_func == "abs_softmax" else logits
        score = jax.nn.sigmoid(z) if config.scoring_func == "sigmoid" else jax.nn.softmax(z, axis=-1)
        probability = _token_mean(score / jnp.sum(score, axis=-1, keepdims=True), attention_mask)
        if top_k is None:
            chosen = gates / config.routed_scaling_factor
        else:
            chosen = jnp.any(top_k_slots(z, top_k), axis=-2).astype(jnp.float32)
        balance = jnp.sum(_token_mean(chosen, attention_mask) * probability, axis=-1)
        losses.append(logits.shape[-1] * jnp.mean(balance))  # the mean over splits, where there are any
    return _mean(losses)


def router_z_loss(router: Mapping[str, RouterOutput], attention_mask: jax.Array | None = None) -> jax.Array:
    """Mean over the routed modules of mean_t logsumexp(z_t)^2, over real tokens: keeps router logits small.

    Source: ST-MoE, arXiv:2202.08906, eq. 5. Arguments as in `load_balancing_loss`.
    """
    squares = [jax.nn.logsumexp(z, axis=-1) ** 2 for z, _ in router.values()]
    return _mean([jnp.mean(_token_mean(square, attention_mask)) for square in squares])


def _token_mean(values: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    """Mean over [batch, seq, ...] of the real tokens."""
    if attention_mask is None:
        return jnp.mean(values, axis=(0, 1))
    real = (attention_mask > 0).astype(jnp.float32)
    total = jnp.tensordot(real, values, axes=2)
    return total / jnp.maximum(jnp.sum(real), 1.0)


def _mean(values: list[jax.Array]) -> jax.Array:
    return jnp.mean(jnp.stack(values)) if values else jnp.zeros((), jnp.float32)
