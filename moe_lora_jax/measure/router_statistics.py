"""What the routers of a model do on some data, summed over its tokens."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_lora_interop.progress import OnProgress, no_progress, tracked
from moe_lora_jax.train.batches import eval_batches
from moe_lora_jax.train.data import TokenData
from moe_lora_jax.train.evaluation import run_batches, split_for_evaluation
from moe_lora_jax.train.health import RouterSums, module_health, router_sums
from moe_lora_jax.train.step import Batch


@dataclass(frozen=True)
class RouterStatistics:
    """Gates of every router, on the tokens with loss.

    topics: the rows of `by_topic`.
    shares: {module: [expert]}, the part of the gate weight that each expert gets; sums to 1.
    entropy: {module: mean over tokens of -sum_e g log g, divided by log E}; 0: one expert per token, 1: all alike.
    by_topic: {module: [topic, expert]}, the shares on the tokens of each topic; rows sum to 1.
    tokens: how many.
    """

    topics: tuple[str, ...]
    shares: Mapping[str, np.ndarray]
    entropy: Mapping[str, float]
    by_topic: Mapping[str, np.ndarray]
    tokens: int


def router_statistics(
    model: nnx.Module,
    data: TokenData | Mapping[str, TokenData],
    *,
    batch_size: int = 8,
    pad_id: int = 0,
    on_progress: OnProgress = no_progress,
) -> RouterStatistics:
    """Runs `model` over the data and sums up what its routers decide.

    Args:
        model: with an adapter, called as `CausalLM` is.
        data: from `read_data`, or several by topic, as from `split_by`.
        batch_size: rows of one forward pass.
        pad_id: the token that padding is made of; it is masked.
        on_progress: called with (done, total) in batches.
    """
    topics = data if isinstance(data, Mapping) else {"all": data}
    batches = [
        (topic, host.batch)
        for topic, of_topic in topics.items()
        for host in eval_batches(of_topic.examples, batch_size=batch_size, pad_id=pad_id)
    ]
    computed = run_batches(_router_sums, *split_for_evaluation(model), (batch for _, batch in batches))
    parts: dict[str, list[dict[str, RouterSums]]] = {topic: [] for topic in topics}
    for (topic, _), sums in zip(tracked(batches, on_progress), computed, strict=True):
        parts[topic].append(sums)
    totals = {topic: _total(of_topic) for topic, of_topic in parts.items()}
    overall = module_health(_total(totals.values()))
    health = [module_health(of_topic) for of_topic in totals.values()]
    return RouterStatistics(
        topics=tuple(topics),
        shares={module: state.shares for module, state in overall.items()},
        entropy={module: state.entropy for module, state in overall.items()},
        by_topic={module: np.stack([h[module].shares for h in health]) for module in overall},
        tokens=sum(int(e.counted.sum()) for of_topic in topics.values() for e in of_topic.examples),
    )


def topic_information(shares: np.ndarray) -> float:
    """Mutual information of topic and expert in bits, topics equally likely: 0 if all topics use the experts alike.

    Args:
        shares: [topic, expert], rows sum to 1.
    """
    mean = shares.mean(axis=0)
    ratio = np.where(shares > 0, shares / np.where(mean > 0, mean, 1.0), 1.0)
    return float(np.sum(shares * np.log2(ratio)) / len(shares))


def _total(parts: Iterable[dict[str, RouterSums]]) -> dict[str, RouterSums]:
    return jax.tree.map(lambda *values: sum(values), *parts)


def _router_sums(model: Any, batch: Batch) -> dict[str, RouterSums]:
    _, router = model(batch.input_ids, attention_mask=batch.attention_mask, return_router=True)
    return router_sums(router, batch.loss_mask)
