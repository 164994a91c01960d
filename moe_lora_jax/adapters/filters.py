"""Which variables train: NNX filters, for `nnx.state(model, router_only)`, `nnx.split`, `nnx.DiffState` and `train`."""

from collections.abc import Callable
from typing import Any, Literal

from flax.typing import PathParts

from moe_lora_jax.layers.mixing import MoeLoraParam

Part = Literal["all", "router", "experts"]
EXPERTS = ("lora_a", "lora_b")


def adapter(path: PathParts, value: Any) -> bool:
    """Every variable of the adapter: experts and routers. The same as the type filter `MoeLoraParam`."""
    return isinstance(value, MoeLoraParam)


def router_only(path: PathParts, value: Any) -> bool:
    """The routers: their kernels, biases, thresholds and task tables."""
    return adapter(path, value) and path[-1] not in EXPERTS


def experts_only(path: PathParts, value: Any) -> bool:
    """The experts' A and B, without the routers."""
    return adapter(path, value) and path[-1] in EXPERTS


PARTS: dict[Part, Callable[[PathParts, Any], bool]] = {"all": adapter, "router": router_only, "experts": experts_only}
