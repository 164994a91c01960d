"""The training loss: masked next-token cross-entropy, and two auxiliary terms on the routers."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_jax.layers.gating import RouterOutput
from moe_lora_jax.layers.router_outputs import alike

LOG_SUM_EXP = "log_sum_exp"
"""What `jax.checkpoint` keeps by this name: one number of each token."""


class TokenLoss(NamedTuple):
    """A mean over counted tokens (fp32, nats), and how many they were: what exact accumulation needs."""

    mean: jax.Array
    counted_tokens: jax.Array


def next_token_loss(logits: jax.Array, input_ids: jax.Array, loss_mask: jax.Array) -> TokenLoss:
    """Mean of -log softmax(logits[:, t-1])[input_ids[:, t]] over the tokens t that are counted, in fp32.

    Args:
        logits: [batch, seq, vocab], any float dtype.
        input_ids: [batch, seq] integers. A counted one outside the vocabulary makes the loss NaN.
        loss_mask: [batch, seq], true where the token is a target. The first token of a row has no prediction and never
            counts.

    Returns:
        The mean (0 if nothing counts) and the number of counted tokens.
    """
    targets, counted = next_tokens(input_ids, loss_mask)
    count = jnp.sum(counted)
    return TokenLoss(summed_loss(logits, targets, counted) / jnp.maximum(count, 1.0), count)


def next_tokens(input_ids: jax.Array, loss_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every token's target, and 1.0 where that counts, [batch, seq].

    The targets move, not the logits: a slice of those would be a copy in fp32.
    """
    counted = jnp.roll(loss_mask, -1, axis=1).astype(jnp.float32).at[:, -1].set(0.0)
    return jnp.roll(input_ids, -1, axis=1), counted


def summed_loss(logits: jax.Array, targets: jax.Array, counted: jax.Array) -> jax.Array:
    """The sum of -log softmax(logits)[target] over the tokens that count, in fp32. logits: [batch, seq, vocab]."""
    scores = logits.astype(jnp.float32)
    exists = (targets >= 0) & (targets < scores.shape[-1])
    target_scores = jnp.where(exists, _scores_of(scores, targets), jnp.nan)
    nll = _log_sum_exp(scores) - target_scores
    return jnp.sum(jnp.where(counted > 0, nll, 0.0))


@jax.custom_jvp
def _log_sum_exp(scores: jax.Array) -> jax.Array:
    """Over the last axis. Its derivative needs the value, which has a name: who keeps that, and computes scores again,
    passes over them once instead of three times."""
    return jax.nn.logsumexp(scores, axis=-1)


@_log_sum_exp.defjvp
def _log_sum_exp_jvp(primals: tuple[jax.Array], tangents: tuple[Any]) -> tuple[jax.Array, jax.Array]:
    value = checkpoint_name(_log_sum_exp(*primals), LOG_SUM_EXP)
    return value, jnp.sum(jnp.exp(primals[0] - value[..., None]) * tangents[0], axis=-1)


@jax.custom_jvp
def _scores_of(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """scores[..., target]. A masked sum lets a compiler never hold the fp32 scores; on the CPU a lookup is faster, and
    the masked sum's derivative faster than a lookup's."""
    return jax.lax.platform_dependent(scores, targets, cpu=_looked_up, default=_masked_sum)


@_scores_of.defjvp
def _scores_of_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    return _scores_of(*primals), _masked_sum(tangents[0], primals[1])


def _looked_up(scores: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]


def _masked_sum(scores: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(jnp.arange(scores.shape[-1]) == targets[..., None], scores, 0.0), axis=-1)


def load_balancing_loss(
    router: Mapping[str, RouterOutput],
    config: MoeLoraConfig,
    attention_mask: jax.Array | None = None,
    task_types: jax.Array | None = None,
) -> jax.Array:
    """The balancing loss that `config.router_aux_loss` names, without its coefficient.

    P_e is the mean over real tokens of the router's probability of expert e: softmax(z), or the scores divided by their
    sum. With top-k, f_e is (tokens that choose e) / tokens, so sum_e f_e = k, and only P carries gradient; with dense
    or threshold routing f_e is the mean gate, which carries gradient too.

        switch      mean over modules of E sum_e f_e P_e: 1 (times k for top-k) when experts are used equally
                    (Switch Transformer, arXiv:2101.03961, eq. 4-6)
        mixtral     E sum_e mean_m(f_e) mean_m(P_e): the tokens of all modules pooled, as transformers does
        localized   mean over modules of var(Q Z) / (mean(Q Z)^2 + 1e-10), Q[b, e] = sum of gates over the real tokens
                    of sample b, Z = 1 + delta where type 1 meets the first half of the experts or type 0 the second,
                    else 1 - delta; var unbiased (LoRAMoE, arXiv:2312.09979, peft/tuners/lora.py)

    Args:
        router: {module path: RouterOutput, fields [batch, seq, expert] or [batch, seq, split, expert]}, from
            `model(..., return_router=True)`.
        config: the model's adapter config.
        attention_mask: [batch, seq], nonzero for real tokens; None counts all.
        task_types: [batch] of 0 and 1, for the localized loss.

    Returns:
        A scalar, fp32; 0 when no module has a router.

    Raises:
        ValueError: a localized loss without task_types.
    """
    if not router:
        return jnp.zeros((), jnp.float32)
    if config.router_aux_loss == "localized":
        if task_types is None:
            raise ValueError("router_aux_loss localized needs task_types: 0 or 1 for every sample of the batch")
        delta = config.router_aux_loss_delta
        return _mean([_localized(out.gates, delta, attention_mask, task_types) for out in router.values()])
    uses = [
        jax.vmap(partial(_use, counts_kept=counts_kept, attention_mask=attention_mask))(out)
        for counts_kept, _, out in alike(router, lambda module: config.for_module(module).top_k is not None)
    ]
    if config.router_aux_loss == "mixtral":
        share, probability = (jnp.mean(jnp.concatenate(parts), axis=0) for parts in zip(*uses, strict=True))
        uses = [(share[None], probability[None])]
    return _mean_of_modules([p.shape[-1] * jnp.sum(f * p, axis=-1) for f, p in uses])


def _use(out: RouterOutput, *, counts_kept: bool, attention_mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """f and P of one module, [..., expert]."""
    probabilities = out.scores / jnp.sum(out.scores, axis=-1, keepdims=True)
    share = out.kept.astype(probabilities.dtype) if counts_kept else out.gates
    return _token_mean(share, attention_mask), _token_mean(probabilities, attention_mask)


def _localized(gates: jax.Array, delta: float, attention_mask: jax.Array | None, task_types: jax.Array) -> jax.Array:
    if gates.ndim == 4:
        gates = jnp.mean(gates, axis=2)
    real = jnp.ones(gates.shape[:2]) if attention_mask is None else (attention_mask > 0).astype(jnp.float32)
    use = jnp.einsum("bse,bs->be", gates, real)
    first_half = jnp.arange(gates.shape[-1]) < gates.shape[-1] // 2
    wanted = first_half[None, :] == (jnp.asarray(task_types)[:, None] == 1)
    weighted = use * jnp.where(wanted, 1.0 + delta, 1.0 - delta)
    return jnp.var(weighted, ddof=1) / (jnp.mean(weighted) ** 2 + 1e-10)


def router_z_loss(router: Mapping[str, RouterOutput], attention_mask: jax.Array | None = None) -> jax.Array:
    """Mean over the routed modules of mean_t logsumexp(z_t)^2, over real tokens: keeps router logits small.

    Source: ST-MoE, arXiv:2202.08906, eq. 5. Arguments as in `load_balancing_loss`.
    """

    def of_module(z: jax.Array) -> jax.Array:
        return _token_mean(jax.nn.logsumexp(z, axis=-1) ** 2, attention_mask)

    return _mean_of_modules([jax.vmap(of_module)(out.logits) for _, _, out in alike(router)])


def _token_mean(values: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    """Mean over [batch, seq, ...] of the real tokens, zero without any."""
    if attention_mask is None:
        return jnp.sum(values, axis=(0, 1)) / max(values.shape[0] * values.shape[1], 1)
    real = (attention_mask > 0).astype(jnp.float32)
    total = jnp.tensordot(real, values, axes=2)
    return total / jnp.maximum(jnp.sum(real), 1.0)


def _mean_of_modules(groups: list[jax.Array]) -> jax.Array:
    """The mean over modules, of arrays [module, ...]; of one module's values, where it has splits, their mean."""
    values = [jnp.mean(group.reshape(group.shape[0], -1), axis=1) for group in groups]
    return jnp.mean(jnp.concatenate(values)) if values else jnp.zeros((), jnp.float32)


def _mean(values: list[jax.Array]) -> jax.Array:
    return jnp.mean(jnp.stack(values)) if values else jnp.zeros((), jnp.float32)
