"""Adapters stay in memory when accelerate offloads the base model to the CPU or to disk.

accelerate leaves the parameters of a module without values (on the meta device) and lends the module new parameters,
with the values, for each call. A dict of parameters is never called, and what is lent cannot be trained: the gradient
goes to a parameter that is thrown away. Adapters are small, so theirs are taken back, and stay.
"""

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import Tensor, nn


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its first parameter is, or where accelerate will lend it."""
    for inner in module.modules():
        for parameter in inner.parameters(recurse=False):
            hooks = _offloaders(inner) if parameter.is_meta else []
            return torch.device(hooks[0].execution_device) if hooks else parameter.device
    return torch.device("cpu")


def take_back(module: nn.Module) -> None:
    """Gives the parameters inside `module` their values back, for good and in place: who holds a parameter, such as an
    optimizer, holds it still. Those whose value accelerate does not have stay as they are."""
    for inner in module.modules():
        hooks = _offloaders(inner)
        if not hooks:
            continue
        for name, parameter in list(inner.named_parameters(recurse=False)):
            if parameter.is_meta and (value := _stored(hooks, name)) is not None:
                give(parameter, value.to(hooks[0].execution_device))
        if not any(p.is_meta for p in inner.parameters(recurse=False)):
            for hook in hooks:
                hook.offload = False  # and it goes on moving the inputs of this module to its device


def give(parameter: nn.Parameter, value: Tensor) -> None:
    """Copies the value into the parameter, which may have none."""
    if parameter.is_meta:
        value = value.to(parameter.dtype, copy=True)
        torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))
    else:
        parameter.data.copy_(value)


def is_between_dispatches(model: Any) -> bool:
    """Whether PeftModel.from_pretrained is at work on a base that is offloaded to disk: it takes the hooks off, which
    leaves weights without values, loads the adapter, and has the whole model dispatched anew."""
    if not getattr(model, "hf_device_map", None) or any(hasattr(m, "_hf_hook") for m in model.modules()):
        return False
    return any(p.is_meta for name, p in model.named_parameters() if "moe_lora_" not in name)


def _offloaders(module: nn.Module) -> list[AlignDevicesHook]:
    """The hooks that keep this module's own parameters elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload]


def _stored(hooks: list[AlignDevicesHook], name: str) -> Tensor | None:
    for hook in hooks:
        try:
            value = hook.weights_map[name]
        except KeyError:
            continue
        if not value.is_meta:
            return value
    return None
