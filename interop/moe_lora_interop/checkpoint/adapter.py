"""An adapter in memory: a config and tensors in canonical axes."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from moe_lora_interop.checkpoint.implied_tensors import layout_problems
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.modules import traversal_order
from moe_lora_interop.disk.lazy import Tensor
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.rules.tensors import Sizes


@dataclass(frozen=True)
class Adapter:
    """A mixture-of-LoRA adapter.

    Attributes:
        config: with target_modules resolved to the sorted list of modules that have experts.
        tensors: {(module, role): array, or what `np.asarray` makes one of: `opened` leaves values in their files}.
            Roles and their canonical axes are `rules.ROLES`. A router of a feed-forward block is at the block's path, a
            router of the model at "".
        base_tensors: {name: likewise} of the base model that came with the adapter (`rules.base_tensors`); no part of
            it, and never written.

    Raises:
        CheckpointError: a tensor that the config implies is missing, one it does not imply is present, or one has
            another shape or dtype; all of them are listed.
    """

    config: MoeLoraConfig
    tensors: Mapping[tuple[str, str], Tensor]
    base_tensors: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        native = {s: t if t.dtype.isnative else _native(np.asarray(t)) for s, t in self.tensors.items()}
        object.__setattr__(self, "tensors", native)
        problems = layout_problems(self.config, self.tensors)
        if problems:
            raise CheckpointError("the tensors do not fit the config", problems)
        object.__setattr__(self, "config", resolved(self.config, self.modules))

    @property
    def modules(self) -> list[str]:
        """The sorted paths of the modules that the adapter changes."""
        return sorted({module for module, role in self.tensors if role == "lora_B"})

    @property
    def routed(self) -> list[str]:
        """Those of them that have a router, or are served by one; the others are plain LoRA."""
        return self.config.routed(self.modules)

    @property
    def features(self) -> dict[str, tuple[int, int]]:
        """{module: (in, out)}."""
        sizes = {slot: tensor.shape for slot, tensor in self.tensors.items()}
        return {m: (sizes[m, "lora_A"][-1], sizes[m, "lora_B"][1]) for m in self.modules}

    @property
    def dtype(self) -> np.dtype:
        """Of the experts; routers may have another."""
        return next(t.dtype for (_, role), t in self.tensors.items() if role == "lora_A")


def resolved(config: MoeLoraConfig, modules: list[str]) -> MoeLoraConfig:
    """The config of an adapter on these modules, as `Adapter.config` has it."""
    config = config.resolved(modules)
    if config.layerwise and config.module_order is None:
        config = dataclasses.replace(config, module_order=traversal_order(config.routed(modules)))
    return config


def _native(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("="))


def config_sizes(config: MoeLoraConfig) -> Sizes:
    """The sizes that only a config knows, as `moe_lora_interop.rules.tensors` asks for them."""

    def sizes(module: str) -> dict[str, int | tuple[int, ...]]:
        fitting, _ = config.fitting([module])
        if not fitting:  # said for all modules at once by `layout_problems`
            return {}
        of_module = fitting[module]
        return {"expert": of_module.num_experts, "rank": of_module.ranks, "split": config.n_splits}

    return sizes
