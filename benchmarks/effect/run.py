"""One run: train, score on validation, test and general text; a row of plain numbers."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.effect.data import LENGTH, Data
from benchmarks.effect.general import WINDOW
from benchmarks.effect.knockout import knockout_matrix, own_and_others, shares_by_task, without
from benchmarks.effect.plan import SEEDS, Run
from benchmarks.effect.score import Scores
from benchmarks.effect.session import Session, mean_loss
from moe_lora_jax.router_statistics import topic_information
from moe_lora_jax.train.data import Example

General = Mapping[str, list[Example]]


def run(session: Session, data: Data, general: General, chosen: Run) -> dict[str, Any]:
    """Trains a new adapter and returns its row."""
    start = time.perf_counter()
    losses = session.train(data.train, chosen.learning_rate, chosen.seed)
    trained = time.perf_counter() - start
    scores, test = scored(session, data, general)
    row = {
        **chosen._asdict(),
        "parameters": session.parameters,
        **session.settings._asdict(),
        "train_loss": round(float(np.mean(losses[-10:])), 4),
        **scores,
        "data": data.digest,
    }
    if session.config.num_experts > 1:
        # the second seed is trained with the chosen learning rate only
        row |= routing(session, data, test, with_knockout=chosen.seed == SEEDS[1])
    return row | {"train_seconds": round(trained), "seconds": round(time.perf_counter() - start)}


def scored(session: Session, data: Data, general: General) -> tuple[dict[str, Any], dict[str, Scores]]:
    """A row's fields, losses in nats, and the scores on the test examples.

    The field `test` holds every example's loss, so that intervals can be computed without running again.
    """
    state = session.state
    validation = [session.score(state, examples, LENGTH) for examples in data.validation.values()]
    test = {task: session.score(state, examples, LENGTH) for task, examples in data.test.items()}
    fields = {
        "validation_loss": round(mean_loss([s.loss for s in validation]), 5),
        "validation_accuracy": round(float(np.mean([s.correct.mean() for s in validation])), 4),
        "test": {
            task: {"loss": s.loss.round(3).tolist(), "correct": "".join("01"[int(c)] for c in s.correct)}
            for task, s in test.items()
        },
        "general_loss": {
            name: round(float(session.score(state, examples, WINDOW).loss.mean()), 5)
            for name, examples in general.items()
        },
    }
    return fields, test


def routing(session: Session, data: Data, test: dict[str, Scores], *, with_knockout: bool) -> dict[str, Any]:
    """What the routers learned, on the answers of the test examples."""
    tasks = list(test)
    shares = shares_by_task({r: [np.asarray(test[t].router[r].gates) for t in tasks] for r in test[tasks[0]].router})
    row: dict[str, Any] = {
        "entropy": round(float(np.mean([_entropy(s) for s in test.values()])), 4),
        "task_information": round(float(np.mean([topic_information(share) for share in shares.values()])), 4),
        "largest_share": round(float(np.mean([share.mean(axis=0).max() for share in shares.values()])), 4),
    }
    if with_knockout:

        def loss(experts: Mapping[str, int] | None) -> np.ndarray:
            state = session.state if experts is None else without(session.state, experts)
            return np.array([session.score(state, data.test[task], LENGTH).loss.mean() for task in tasks])

        matrix = knockout_matrix(shares, loss, len(tasks))
        own, others, p = own_and_others(matrix)
        row["knockout"] = {"matrix": matrix.round(4).tolist(), "own": own, "others": others, "p": p}
        row["shares"] = {router: share.round(3).tolist() for router, share in shares.items()}
    return row


def _entropy(scores: Scores) -> float:
    """Mean over routers of a token's gate entropy, divided by log E."""
    return float(np.mean([s.entropy / s.tokens / np.log(len(s.gates)) for s in scores.router.values()]))
