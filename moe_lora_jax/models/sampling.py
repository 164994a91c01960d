"""Choosing the next token from logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, as far as it shapes the compiled program; temperature and top_p are values in it.

    Attributes:
        greedy: the most likely token; nothing is drawn.
        top_k: draw from the k most likely tokens (ties with the kth stay); None for all.
        nucleus: apply top_p.
    """

    greedy: bool
    top_k: int | None
    nucleus: bool


def choose(
    logits: jax.Array, sampling: Sampling, temperature: jax.Array, top_p: jax.Array, key: jax.Array
) -> jax.Array:
    """Next tokens: logits [batch, vocab] -> int32 [batch]. The key is for drawing; greedy choice ignores it.

    In float32 and in transformers' order: divide by the temperature, keep the top k, then keep the smallest set of
    most likely tokens whose probabilities reach `top_p`; at least one token always stays. Tokens exactly as likely as
    the last one kept are kept too (transformers drops some of them by sort order).

    Source: TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper in
    transformers/generation/logits_process.py@5.24.0.
    """
    logits = logits.astype(jnp.float32)
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.nucleus:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # Sorted, so the kept tokens come first and the smallest kept logit is a threshold.
        smallest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
