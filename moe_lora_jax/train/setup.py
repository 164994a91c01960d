"""From a model and the settings to the step: what a run begins with, and what a plan of a run compiles."""

from typing import NamedTuple

import optax
from flax import nnx

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_jax.adapters.filters import PARTS
from moe_lora_jax.sharding import mesh_of
from moe_lora_jax.train.optimizer import adamw, warmup_cosine
from moe_lora_jax.train.refusals import check_mesh, check_selection
from moe_lora_jax.train.settings import TrainSettings
from moe_lora_jax.train.step import FrozenState, TrainState, TrainStep, make_train_step, split_model


class Setup(NamedTuple):
    """The learning rate of every step, the states before the first one, and the step."""

    schedule: optax.Schedule
    state: TrainState
    frozen: FrozenState
    step: TrainStep


def set_up(model: nnx.Module, config: MoeLoraConfig, settings: TrainSettings, total_steps: int) -> Setup:
    """The states and the jitted step of a run; the model is in eval mode afterwards.

    Raises:
        TrainingError: nothing is selected to train, or the batch does not fit the model's mesh.
    """
    schedule = warmup_cosine(settings.learning_rate, settings.warmup_steps, total_steps)
    optimizer = adamw(schedule, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm)
    model.train()
    graphdef, state, frozen = split_model(model, PARTS[settings.train_only], optimizer)
    model.eval()
    check_selection(state.trainable, settings)
    check_mesh(mesh_of(state.trainable), settings)
    step = make_train_step(graphdef, optimizer, config, state, loss_chunk=settings.loss_chunk)
    return Setup(schedule, state, frozen, step)
