"""Loss and exact match of every example, in one forward pass, and what the routers did on the answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_lora_jax.train.batches import collate
from moe_lora_jax.train.data import Example
from moe_lora_jax.train.evaluation import run_batches
from moe_lora_jax.train.health import RouterSums, router_sums
from moe_lora_jax.train.losses import next_token_loss
from moe_lora_jax.train.step import Batch

ROWS = 16  # of one forward pass


class Scores(NamedTuple):
    """loss: [example], mean nats per counted token. correct: [example]. router: sums over all counted tokens."""

    loss: np.ndarray
    correct: np.ndarray
    router: dict[str, RouterSums]


def score(graphdef: nnx.GraphDef, state: nnx.State, examples: Sequence[Example], length: int) -> Scores:
    """`graphdef` and `state` are of the whole model in evaluation mode; every batch has the same length.

    An answer is correct if each of its tokens is the most likely one after the prompt and the right tokens before it:
    exactly when greedy decoding writes those tokens. An answer in other tokens of the same text counts as wrong.
    """
    parts = [examples[start : start + ROWS] for start in range(0, len(examples), ROWS)]
    batches = (collate(part, ROWS, (length,), 0).batch for part in parts)
    losses, hits, routers = zip(*run_batches(_scores, graphdef, (state,), batches), strict=True)
    real = np.arange(len(parts) * ROWS) < len(examples)  # the last batch is filled up
    router = jax.tree.map(lambda *values: sum(values), *routers)
    return Scores(np.concatenate(losses)[real], np.concatenate(hits)[real], router)


def _scores(model: Any, batch: Batch) -> tuple[jax.Array, jax.Array, dict[str, RouterSums]]:
    logits, router = model(batch.input_ids, attention_mask=batch.attention_mask, return_router=True)
    rows = (field[:, None] for field in (logits, batch.input_ids, batch.loss_mask))  # each a batch of one
    loss = jax.vmap(next_token_loss)(*rows).mean
    targets, counted = batch.input_ids[:, 1:], batch.loss_mask[:, 1:]
    correct = jnp.all((jnp.argmax(logits[:, :-1], axis=-1) == targets) | ~counted, axis=1)
    # the router's decision at a token serves the prediction of the next one
    decides = jnp.pad(counted, ((0, 0), (0, 1)))
    return loss, correct, router_sums(router, decides)
