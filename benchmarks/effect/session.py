"""One method on the base model: trained with any learning rate and seed, compiled once."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

import moe_lora_jax as mlj
from benchmarks.effect.data import LENGTH, Split
from benchmarks.effect.score import Scores, score
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_jax.train import Batch, make_train_step, split_model
from moe_lora_jax.train.batches import collate
from moe_lora_jax.train.data import Example
from moe_lora_jax.train.evaluation import split_for_evaluation
from moe_lora_jax.train.optimizer import warmup_cosine


class Settings(NamedTuple):
    """steps of batch rows each; every method gets the same ones, of the same examples for the same seed."""

    steps: int = 100
    batch: int = 16
    warmup: int = 10


def optimizer(learning_rate: float, settings: Settings) -> optax.GradientTransformation:
    """Clipped Adam. The learning rate is part of the state, so that one program serves all of them."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.scale_by_schedule(warmup_cosine(1.0, settings.warmup, settings.steps)),
        optax.inject_hyperparams(optax.scale)(step_size=-learning_rate),
    )


def batches(train: Split, settings: Settings, seed: int) -> Iterator[Batch]:
    """Every task is as likely as any other; its examples come in a random order, again and again."""
    random = np.random.default_rng(seed)
    tasks = list(train)
    queues: dict[str, list[int]] = {task: [] for task in tasks}
    for _ in range(settings.steps):
        chosen: list[Example] = []
        for task in random.choice(tasks, settings.batch):
            if not queues[task]:
                queues[task] = random.permutation(len(train[task])).tolist()
            chosen.append(train[task][queues[task].pop()])
        batch = collate(chosen, settings.batch, (LENGTH,), 0).batch
        yield jax.tree.map(lambda field: field[None], batch)


class Session:
    """A base model with one method's adapter.

    Args:
        base: the model; the adapter is applied to it in place.
        config: the method.
        settings: the budget.
    """

    def __init__(self, base: mlj.CausalLM, config: MoeLoraConfig, settings: Settings):
        self.model, self.config, self.settings = base, config, settings
        self._apply(seed=0)
        graphdef, _, _ = split_model(base, mlj.MoeLoraParam, optimizer(0.0, settings))
        self._step = make_train_step(graphdef, optimizer(0.0, settings), base.moe_lora_config)  # type: ignore[attr-defined]
        self._evaluated, _ = split_for_evaluation(base)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.model, mlj.MoeLoraParam)))

    @property
    def state(self) -> nnx.State:
        """What `score` takes."""
        return nnx.split(self.model)[1]

    def train(self, train: Split, learning_rate: float, seed: int) -> list[float]:
        """A new adapter; returns the loss of every step."""
        mlj.remove_moe_lora(self.model)
        self._apply(seed)
        _, state, frozen = split_model(self.model, mlj.MoeLoraParam, optimizer(learning_rate, self.settings))
        losses: list[Any] = []
        for batch in batches(train, self.settings, seed):
            state, metrics = self._step(state, frozen, batch)
            losses.append(metrics.lm_loss)
        nnx.update(self.model, state.trainable)
        return [float(loss) for loss in losses]

    def score(self, state: nnx.State, examples: Sequence[Example], length: int) -> Scores:
        """What this method does on the examples, with the weights in `state`."""
        return score(self._evaluated, state, examples, length)

    def _apply(self, seed: int) -> None:
        mlj.apply_moe_lora(self.model, self.config, rngs=nnx.Rngs(seed))

    def close(self) -> None:
        """Takes the adapter off."""
        mlj.remove_moe_lora(self.model)
