"""Puts routers that serve several layers beside them, after PEFT has wrapped the layers; and takes them off."""

from typing import TypeVar

from torch import nn

from interop.config import MoeLoraConfig
from interop.peft_tuner.feed_forward import last_of, linear_children
from interop.peft_tuner.layer import Linear, features
from interop.peft_tuner.model_router import ModelRouter
from interop.peft_tuner.router import MoeLoraLayer
from interop.peft_tuner.shared_router import CHILD, BlockRouter, SharedRouter
from interop.presence import router_owners

Router = TypeVar("Router", bound=SharedRouter)


def wire(model: nn.Module, adapter_name: str, config: MoeLoraConfig) -> list[MoeLoraLayer]:
    """Adds the adapter's shared routers, which nothing but this call creates.

    Returns:
        The routers, and the last layers of blocks: PEFT has not seen these and knows nothing of their state.
    """
    layers = {p: m for p, m in model.named_modules() if isinstance(m, Linear) and adapter_name in m.moe_lora_A}
    routed = {p: m for p, m in layers.items() if m.moe_lora_module_config[adapter_name].has_router}
    if config.scope == "ffn":
        owners = router_owners(config, list(routed))
        return [
            layer for path in owners for layer in _wire_block(path, model.get_submodule(path), adapter_name, config)
        ]
    if routed and (config.scope == "model" or config.router_input == "task"):
        return [_wire_model(model, routed, adapter_name, config)]
    return []


def unwire(model: nn.Module) -> None:
    """Takes every shared router off."""
    for router in [m for m in model.modules() if isinstance(m, SharedRouter)]:
        router.detach()


def _wire_block(path: str, block: nn.Module, adapter_name: str, config: MoeLoraConfig) -> list[MoeLoraLayer]:
    """The block's last layer is wrapped even if it is no target: it sums over the experts."""
    last, base = last_of(block)
    if not isinstance(getattr(block, last), Linear):
        setattr(block, last, Linear(getattr(block, last)))
    router = _router(block, BlockRouter)
    module = config.for_module(path)
    shared = router.add_adapter(adapter_name, config, module, features(base)[1])
    for name in linear_children(block):
        layer = getattr(block, name)
        if isinstance(layer, Linear) and (name == last or adapter_name in layer.moe_lora_A):
            layer.moe_lora_shared[adapter_name] = shared
            layer.moe_lora_is_last[adapter_name] = name == last
            layer.moe_lora_config.setdefault(adapter_name, config)
            layer.moe_lora_module_config.setdefault(adapter_name, module)
    return [router, getattr(block, last)]


def _wire_model(model: nn.Module, routed: dict[str, Linear], adapter_name: str, config: MoeLoraConfig) -> SharedRouter:
    router = _router(model, ModelRouter)
    order = config.module_order if config.layerwise else None
    hidden_size = 0 if config.router_input == "task" else model.config.get_text_config().hidden_size  # type: ignore
    shared = router.add_adapter(adapter_name, config, config.for_module(""), hidden_size, len(order) if order else 1)
    for path, layer in routed.items():
        layer.moe_lora_shared[adapter_name] = shared
        layer.moe_lora_layer_index[adapter_name] = order.index(path) if order else 0
    return router


def _router(owner: nn.Module, kind: type[Router]) -> Router:
    router = getattr(owner, CHILD, None)
    return router if isinstance(router, kind) else kind(owner)
