"""Whether a model's layers and routers compute what its config says, so that a file says it too."""

from collections.abc import Iterator
from typing import Any

from flax import nnx

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.errors import CheckpointError
from moe_lora_jax.adapters.apply import adapted_names
from moe_lora_jax.layers.feed_forward import MoeLoraFeedForward, SlotLinear
from moe_lora_jax.layers.gating import Gating
from moe_lora_jax.layers.linear import MoeLoraLinear
from moe_lora_jax.layers.mixing import MoeLoraParam
from moe_lora_jax.layers.model_router import ModelRouter
from moe_lora_jax.layers.multi_adapter import MultiAdapterLinear
from moe_lora_jax.layers.router import Router, TaskRouter
from moe_lora_jax.layers.temperature import Temperature
from moe_lora_jax.tree import modules

ROUTERS = (Router, TaskRouter, ModelRouter)
LAYERS = (MoeLoraLinear, MoeLoraFeedForward, SlotLinear, MultiAdapterLinear)
PLACES = ("router", "moe_lora_router")


def check_ours(model: nnx.Module, config: MoeLoraConfig, root: str = "") -> None:
    """A file holds numbers and a config, no code: a class with a rule of its own would be saved as the config's rule.

    Args:
        model: with the adapter, or a part of one.
        config: the adapter's.
        root: the part's path.

    Raises:
        CheckpointError: a layer or router whose class is not exactly ours, one with a method replaced, or one whose
            gating, mix or scaling is not the config's; all of them.
    """
    problems = list(dict.fromkeys(_problems(model, config, root)))
    if problems:
        hint = "save the arrays yourself, or express the rule in the config"
        raise CheckpointError("the config does not describe this model, so it cannot be saved", [*problems, hint])


def _problems(model: nnx.Module, config: MoeLoraConfig, root: str) -> Iterator[str]:
    names = adapted_names(model)
    for inner, module in modules(model):
        path = ".".join(part for part in (root, inner) if part)
        kind = type(module)
        if kind not in (*ROUTERS, *LAYERS, Temperature):
            if isinstance(module, LAYERS + ROUTERS) or _owns_parameters(module):
                yield _other_class(path, module)
        elif replaced := [n for n, v in vars(module).items() if callable(v) and callable(getattr(kind, n, None))]:
            yield f"{path}: {', '.join(replaced)} replaced, expected the method of {kind.__name__}"
        elif isinstance(module, MoeLoraLinear | SlotLinear):
            sizes = config.for_module(_module(path, names))
            if (expected := sizes.scalings) != module.scalings:
                yield f"{path}: scalings: found {module.scalings}, expected {expected} as in the config"
            mix = config.mix if sizes.has_router else "outputs"
            if isinstance(module, MoeLoraLinear) and module.mix != mix:
                yield f"{path}: mix: found {module.mix!r}, expected {mix!r} as in the config"
        elif isinstance(module, Temperature):
            if module.least != config.router_temperature:
                yield f"{path}: least: found {module.least}, expected {config.router_temperature} as in the config"
        elif kind in ROUTERS:
            owner = path.rpartition(".")[0] if kind is not ModelRouter else ""
            rule = Gating.of(config, config.for_module(_module(owner, names)))
            if module.gating != rule:
                yield f"{path}: gating: found {module.gating}, expected {rule} as in the config"
        for place in PLACES:
            router = vars(module).get(place)
            if (kind in LAYERS or place == "moe_lora_router") and router is not None and type(router) not in ROUTERS:
                yield _other_class(f"{path}.{place}".lstrip("."), router)


def _other_class(path: str, module: Any) -> str:
    kind, ours = type(module), ", ".join(c.__name__ for c in (*LAYERS, *ROUTERS) if isinstance(module, c))
    return f"{path}: found {kind.__module__}.{kind.__qualname__}, expected {ours or 'a class of moe_lora_jax'} itself"


def _owns_parameters(module: Any) -> bool:
    return not isinstance(module, nnx.List) and any(isinstance(v, MoeLoraParam) for v in vars(module).values())


def _module(path: str, names: dict[str, str]) -> str:
    plain = ".".join(part for part in path.split(".") if part != "base_layer")
    return names.get(plain, plain)
