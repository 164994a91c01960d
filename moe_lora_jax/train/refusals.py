"""Runs that cannot be: each is refused before anything is written, with what was found and what is expected."""

import importlib
import inspect
from typing import Any

import jax
from jax.sharding import Mesh

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_jax.sharding import row_parts
from moe_lora_jax.train.errors import TrainingError
from moe_lora_jax.train.settings import TrainSettings


def trainable_config(model: Any) -> MoeLoraConfig:
    """The config of the model's adapter.

    Raises:
        TrainingError: there is no adapter, or it needs what token data does not have.
    """
    config: MoeLoraConfig | None = getattr(model, "moe_lora_config", None)
    if config is None:
        raise TrainingError("nothing to train", ["the model has no adapter: call apply_moe_lora or load_adapter first"])
    problems = []
    if config.router_aux_loss == "localized" and config.router_aux_loss_coef != 0:
        problems.append(
            f"router_aux_loss_coef: found {config.router_aux_loss_coef} with router_aux_loss 'localized', expected 0: "
            "that loss needs samples marked by type, the data has no marks"
        )
    if config.router_input == "task":
        problems.append("router_input: found 'task', expected 'hidden': the data has no task ids")
    if problems:
        raise TrainingError("cannot train", problems)
    return config


def check_packing(model: Any, settings: TrainSettings) -> None:
    """Raises TrainingError if rows shall hold several examples, and the model takes a row for one."""
    if settings.packing and "segment_ids" not in inspect.signature(model.__call__).parameters:  # **kwargs may drop it
        problem = f"packing: found True with {type(model).__name__}, whose call takes no segment_ids, expected False"
        raise TrainingError("the model cannot tell the examples of a row apart", [problem])


def check_reporters(settings: TrainSettings) -> None:
    """Raises TrainingError if the metrics shall go where a package is missing."""
    if "wandb" in settings.report_to:
        try:
            importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            problem = "report_to: wandb needs the package wandb: pip install 'moe-lora-jax[wandb]'"
            raise TrainingError("cannot report to Weights & Biases", [problem]) from error


def check_selection(trainable: Any, settings: TrainSettings) -> None:
    """Raises TrainingError if `train_only` leaves nothing to train."""
    if not jax.tree.leaves(trainable):
        problem = f"train_only = {settings.train_only!r} selects nothing: every module has one expert, so no router"
        raise TrainingError("nothing to train", [problem])


def check_mesh(mesh: Mesh | None, settings: TrainSettings) -> None:
    """Raises TrainingError if several processes have no mesh, or a batch's rows cannot be spread evenly over one."""
    if mesh is None and jax.process_count() > 1:
        problem = f"found {jax.process_count()} processes and a model on one device"
        raise TrainingError("no mesh", [f"{problem}, expected load_base_model(..., mesh=mlj.make_mesh(...))"])
    if mesh is not None and settings.batch_size % row_parts(mesh):
        axes = " x ".join(f"{name} {mesh.shape[name]}" for name in mesh.axis_names)
        problem = f"batch_size: found {settings.batch_size}, expected a multiple of {row_parts(mesh)}"
        raise TrainingError("the mesh does not fit", [f"{problem} on the mesh {axes}: rows go over data and fsdp"])
