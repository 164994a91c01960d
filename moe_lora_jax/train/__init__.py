"""Training a mixture-of-LoRA adapter: data, losses, optimizer, a functional step, and the loop with exact resume."""

from moe_lora_jax.adapters.filters import experts_only, router_only
from moe_lora_jax.sharding import put_rest, put_rows
from moe_lora_jax.train.batches import HostBatch, TrainBatches
from moe_lora_jax.train.chunked_loss import model_loss
from moe_lora_jax.train.data import TokenData, read_data, split_by, split_data
from moe_lora_jax.train.errors import DataError, TrainingError
from moe_lora_jax.train.evaluation import evaluate
from moe_lora_jax.train.examples import Example
from moe_lora_jax.train.loop import TrainResult, train
from moe_lora_jax.train.losses import load_balancing_loss, next_token_loss, router_z_loss
from moe_lora_jax.train.optimizer import adamw, warmup_cosine
from moe_lora_jax.train.packing import PackedRows
from moe_lora_jax.train.planning import Plan, lora_of, plan
from moe_lora_jax.train.settings import TrainSettings
from moe_lora_jax.train.step import (
    Batch,
    FrozenState,
    StepMetrics,
    TrainState,
    make_train_step,
    merge_back,
    split_model,
)
from moe_lora_jax.train.tokenizer import load_tokenizer

__all__ = [
    "Batch",
    "DataError",
    "Example",
    "FrozenState",
    "HostBatch",
    "PackedRows",
    "Plan",
    "StepMetrics",
    "TokenData",
    "TrainBatches",
    "TrainResult",
    "TrainSettings",
    "TrainState",
    "TrainingError",
    "adamw",
    "evaluate",
    "experts_only",
    "load_balancing_loss",
    "load_tokenizer",
    "lora_of",
    "make_train_step",
    "merge_back",
    "model_loss",
    "next_token_loss",
    "plan",
    "put_rest",
    "put_rows",
    "read_data",
    "router_only",
    "router_z_loss",
    "split_by",
    "split_data",
    "split_model",
    "train",
    "warmup_cosine",
]
