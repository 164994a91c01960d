"""One run: train, score on validation, test and general text; a row of plain numbers."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.effect.bootstrap import mean
from benchmarks.effect.data import LENGTH, Data, digest
from benchmarks.effect.general import WINDOW
from benchmarks.effect.knockout import knockout_matrix, own_and_others, without
from benchmarks.effect.plan import SEEDS, Run
from benchmarks.effect.score import Scores
from benchmarks.effect.session import Session
from moe_lora_jax.measure.router_statistics import topic_information
from moe_lora_jax.train.data import Example
from moe_lora_jax.train.health import module_health

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
        **provenance(data, general),
    }
    if session.config.num_experts > 1:
        # the second seed is trained with the chosen learning rate only
        row |= routing(session, data, test, with_knockout=chosen.seed == SEEDS[1])
    return row | {"train_seconds": round(trained), "seconds": round(time.perf_counter() - start)}


def provenance(data: Data, general: General) -> dict[str, str]:
    """Checksums of all tokens: rows that differ in them are not comparable."""
    return {"data": data.digest, "general": digest(general)}


def scored(session: Session, data: Data, general: General) -> tuple[dict[str, Any], dict[str, Scores]]:
    """A row's fields, losses in nats, and the scores on the test examples.

    The field `test` holds every example's loss and whether it is right ("0" or "1"): the intervals resample examples.
    """
    state = session.state
    validation = {task: session.score(state, examples, LENGTH) for task, examples in data.validation.items()}
    test = {task: session.score(state, examples, LENGTH) for task, examples in data.test.items()}
    fields = {
        "validation_loss": round(mean({task: s.loss for task, s in validation.items()}), 5),
        "validation_accuracy": round(mean({task: s.correct for task, s in validation.items()}), 4),
        "test": {
            task: {"loss": [round(float(x), 3) for x in s.loss], "correct": "".join("01"[int(c)] for c in s.correct)}
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
    health = {task: module_health(scores.router) for task, scores in test.items()}
    shares = {router: np.stack([health[task][router].shares for task in tasks]) for router in health[tasks[0]]}
    row: dict[str, Any] = {
        "entropy": round(float(np.mean([h.entropy for of_task in health.values() for h in of_task.values()])), 4),
        "task_information": round(float(np.mean([topic_information(share) for share in shares.values()])), 4),
        "largest_share": round(float(np.mean([share.mean(axis=0).max() for share in shares.values()])), 4),
    }
    if with_knockout:

        def loss(experts: Mapping[str, int] | None) -> np.ndarray:
            state = session.state if experts is None else without(session.state, experts)
            return np.array([session.score(state, data.test[task], LENGTH).loss.mean() for task in tasks])

        matrix = knockout_matrix(shares, loss, len(tasks))
        own, others, p = own_and_others(matrix)
        row["knockout"] = {"own": own, "others": others, "p": p}
    return row
