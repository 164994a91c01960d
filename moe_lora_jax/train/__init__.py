"""Training a mixture-of-LoRA adapter: data, losses, optimizer, a functional step, and the loop with exact resume."""

from moe_lora_jax.adapters.filters import experts_only, router_only
from moe_lora_jax.train.batches import TrainBatches
from moe_lora_jax.train.data import TokenData, read_data, split_by, split_data
from moe_lora_jax.train.errors import DataError, TrainingError
from moe_lora_jax.train.evaluation import evaluate
from moe_lora_jax.train.loop import TrainResult, train
from moe_lora_jax.train.losses import load_balancing_loss, next_token_loss, router_z_loss
from moe_lora_jax.train.optimizer import adamw, warmup_cosine
from moe_lora_jax.train.planning import Plan, lora_of, plan
from moe_lora_jax.train.settings import TrainSettings
from moe_lora_jax.train.step import Batch, make_train_step, merge_back, split_model
from moe_lora_jax.train.tokenizer import load_tokenizer

__all__ = [
    "Batch",
    "DataError",
    "Plan",
    "TokenData",
    "TrainBatches",
    "TrainResult",
    "TrainSettings",
    "TrainingError",
    "adamw",
    "evaluate",
    "experts_only",
    "load_balancing_loss",
    "load_tokenizer",
    "lora_of",
    "make_train_step",
    "merge_back",
    "next_token_loss",
    "plan",
    "read_data",
    "router_only",
    "router_z_loss",
    "split_by",
    "split_data",
    "split_model",
    "train",
    "warmup_cosine",
]
