"""Will a run fit, and what will it cost? Its step, compiled for devices that are not there."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.errors import ConfigError
from moe_lora_jax.compiled import Cycles, Memory, compile_ahead, usable_bytes
from moe_lora_jax.sharding import is_abstract, mesh_of, row_sharding
from moe_lora_jax.train.batches import bucket_lengths
from moe_lora_jax.train.refusals import check_packing, trainable_config
from moe_lora_jax.train.settings import TrainSettings
from moe_lora_jax.train.setup import Setup, set_up
from moe_lora_jax.train.step import Batch

_SCHEDULED = 1000  # steps of a run whose length is not known: numbers in the program, not its size


@dataclass(frozen=True)
class Plan:
    """A train step as the compiler of its devices sees it. Sizes are bytes on one device.

    devices: how many, and of which kind.
    usable: what a program can have there.
    memory: arguments, temporaries, total and largest buffers of the step.
    code: of the program itself.
    kept: what lies beside it while it runs: the model as loaded, as far as the step has copies of it (with scan_layers
        of the layers, always of what is trained).
    cycles: of one step on one device; None for what does not fit and for GPUs.
    refusal: the compiler's words if the step alone does not fit.
    """

    devices: int
    kind: str
    usable: int
    memory: Memory
    code: int
    kept: int
    cycles: Cycles | None
    refusal: str | None

    @property
    def needed(self) -> int:
        """The step's total, its program, and what lies beside it."""
        return self.memory.total + self.code + self.kept

    @property
    def fits(self) -> bool:
        return self.refusal is None and self.needed <= self.usable


def plan(model: nnx.Module, settings: TrainSettings, *, max_length: int) -> Plan:
    """Compiles the step that `train` would run, and says what its compiler knows. Nothing is computed.

    Evaluation, saving and the reading of checkpoints are not in it.

    Example:
        >>> mesh = mlj.make_mesh({"fsdp": 16}, devices=topology("v5e:4x4").devices)
        >>> model = mlj.abstract_base_model("config.json", mesh=mesh, scan_layers=True)
        >>> mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(0))
        >>> plan(model, TrainSettings(batch_size=16), max_length=8192).fits

    Args:
        model: `abstract_base_model` with an adapter (`apply_moe_lora`), on a mesh of devices of a
            `compiled.topology`.
        settings: as of `train`; batch size, accumulation, packing, selection, clipping and decay change the step.
        max_length: tokens of the longest row; it is rounded up as the batches of a run are.

    Raises:
        TrainingError: what `train` would refuse.
        ConfigError: the model has arrays, or no mesh, or its devices are of a kind whose memory is not known.
    """
    config = trainable_config(model)
    check_packing(model, settings)
    mesh = mesh_of(model)
    if not is_abstract(model) or mesh is None:
        problem = "model: expected one of abstract_base_model(..., mesh=make_mesh(..., devices=topology(...).devices))"
        raise ConfigError("cannot plan", [problem])
    usable, kind = usable_bytes(mesh.devices.flat[0]), mesh.devices.flat[0].device_kind
    setup = set_up(model, config, settings, settings.steps or _SCHEDULED)
    shape = (settings.gradient_accumulation, settings.batch_size, bucket_lengths(max_length)[-1])
    dtypes: Any = Batch(jnp.int32, jnp.int32, jnp.bool, jnp.int32 if settings.packing else None)  # type: ignore[arg-type]
    batch = jax.tree.map(lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=row_sharding(mesh, 1)), dtypes)
    ahead = compile_ahead(setup.step.lower(setup.state, setup.frozen, batch))
    kept = _kept(model, setup)
    return Plan(mesh.devices.size, kind, usable, ahead.memory, ahead.code, kept, ahead.cycles, ahead.refusal)


def _kept(model: nnx.Module, setup: Setup) -> int:
    """Of the model's variables those that the step is not given itself, but copied or stacked."""
    given = {path for state in setup.frozen for path, _ in nnx.to_flat_state(state)}
    flat = nnx.to_flat_state(nnx.state(model))
    return sum(_bytes(variable.get_value()) for path, variable in flat if path not in given)


def _bytes(shape: jax.ShapeDtypeStruct) -> int:
    assert shape.sharding is not None
    return math.prod(shape.sharding.shard_shape(shape.shape)) * shape.dtype.itemsize


def lora_of(config: MoeLoraConfig) -> MoeLoraConfig:
    """One LoRA with as many numbers in A and B as the mixture, on the same layers: what a plan is compared with.

    Raises:
        ConfigError: experts or ranks differ by module, so that one LoRA cannot have as many.
    """
    patterns = ("rank_pattern", "num_experts_pattern")
    problems = [f"{name}: found {getattr(config, name)}, expected none" for name in patterns if getattr(config, name)]
    if config.shared_lora_A:
        problems.append("shared_lora_A: found True, expected False")
    if problems:
        raise ConfigError("no single LoRA has as many parameters as this mixture", problems)
    rank = sum(config.r) if isinstance(config.r, list) else config.r * config.num_experts
    same = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "task_type")
    fields = {name: getattr(config, name) for name in same}
    return dataclasses.replace(MoeLoraConfig(), r=rank, num_experts=1, **fields)
