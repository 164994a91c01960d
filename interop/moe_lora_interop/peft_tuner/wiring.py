"""Puts routers that serve several layers beside them, after PEFT has wrapped the layers; and takes them off."""

from typing import TypeVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.modules import last_bias_problem, last_layer, router_owners
from moe_lora_interop.peft_tuner.layer import Linear, features, unsupported
from moe_lora_interop.peft_tuner.model_router import ModelRouter
from moe_lora_interop.peft_tuner.router import MoeLoraLayer
from moe_lora_interop.peft_tuner.shared_router import CHILD, BlockRouter, SharedRouter

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
        getattr(block, last).path = f"{path}.{last}"
    router = _router(block, BlockRouter)
    router.path = path
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


def linear_children(block: nn.Module) -> dict[str, nn.Module]:
    """{name: base layer} of the block's own linear layers, in order, whether wrapped or not."""
    bases = {n: m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for n, m in block.named_children()}
    return {name: base for name, base in bases.items() if unsupported(base) is None}


def last_of(block: nn.Module) -> tuple[str, nn.Module]:
    """(name, base layer) of the last layer of a block without `block_problem`."""
    layers = linear_children(block)
    name = last_layer({n: features(m) for n, m in layers.items()})
    assert name is not None, "checked before"
    return name, layers[name]


def block_problem(path: str, block: nn.Module, config: MoeLoraConfig) -> str | None:
    """Why this block cannot have experts that are whole blocks, or None if it can."""
    if not path:
        return "target_modules: found layers of the model itself, expected layers inside feed-forward blocks"
    for name, child in block.named_children():
        inner = () if isinstance(child, MoeLoraLayer) or name in linear_children(block) else child.modules()
        if any(unsupported(module) is None for module in inner):
            return f"{path}: {name} has linear layers of its own, expected a feed-forward block"
    layers = linear_children(block)
    shapes = {name: features(layer) for name, layer in layers.items()}
    last = last_layer(shapes)
    if last is None or len(layers) < 2:
        return f"{path}: found the layers {shapes}, expected several, exactly one of which has the block's output"
    has_bias = getattr(layers[last], "bias", None) is not None
    return last_bias_problem(config, f"{path}.{last}") if has_bias else None
