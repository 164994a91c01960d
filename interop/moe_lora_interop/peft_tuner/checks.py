"""What has to fit between a config and a model before anything is wrapped."""

import re
import warnings
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.modules import order_problems, router_owners
from moe_lora_interop.errors import ConfigError
from moe_lora_interop.peft_tuner.first_pass import unfit
from moe_lora_interop.peft_tuner.layer import Linear, features
from moe_lora_interop.peft_tuner.router import MoeLoraLayer
from moe_lora_interop.peft_tuner.shared_router import CHILD
from moe_lora_interop.peft_tuner.wiring import block_problem


def check_fit(model: nn.Module, config: MoeLoraConfig, linears: dict[str, nn.Module], chosen: list[str]) -> None:
    """Refuses a config that cannot be applied to the chosen modules.

    Args:
        linears: {path: base layer} of the model.
        chosen: the paths that the config's targets select, in the model's order.

    Raises:
        ConfigError: with every problem.
    """
    problems: list[str] = []
    routed = config.routed(chosen)
    if config.scope == "ffn":
        owners = {path: model.get_submodule(path) for path in router_owners(config, routed)}
        problems += [p for path, block in owners.items() if (p := block_problem(path, block, config)) is not None]
    if config.scope == "model" and config.router_input == "hidden" and routed and (reason := unfit(model)):
        problems.append(f"scope model with router_input hidden: {reason}")
    if config.n_splits > 1:
        for module in routed:
            sizes = features(linears[module])
            if any(size % config.n_splits for size in sizes):
                problems.append(
                    f"{module}: sizes {sizes[0]} -> {sizes[1]}, expected multiples of n_splits {config.n_splits}"
                )
    problems += order_problems(config, routed)
    if problems:
        raise ConfigError("the config does not fit the model", problems)


def check_adapter_name(adapter_name: str, paths: Any) -> None:
    """PEFT separates adapters in a state dict by looking for their names between the dots of its keys.

    Raises:
        ValueError: the name is a number, or a part of a path or parameter name.
    """
    if adapter_name.isdigit():
        raise ValueError(
            f"adapter name {adapter_name!r} is a number, like the model's layers: PEFT would drop layer {adapter_name} "
            f"from the files of other adapters. Choose another name, for example adapter_{adapter_name}"
        )
    own = (*Linear.adapter_layer_names, *MoeLoraLayer.adapter_layer_names, CHILD)
    taken = {"base_model", "model", "base_layer", "weight", "bias", *own}
    for path in paths:
        taken.update(path.split("."))
    if adapter_name in taken:
        raise ValueError(
            f"adapter name {adapter_name!r} is also a part of this model's parameter names: PEFT would drop those "
            f"parameters from the files of other adapters. Choose another name, for example adapter_{adapter_name}"
        )


def untouched_experts(model: nn.Module) -> dict[str, int]:
    """{path of a fused expert parameter: its size}: parameters of three axes, those of convolutions apart."""
    return {
        f"{path}.{name}" if path else name: parameter.numel()
        for path, module in model.named_modules()
        if not isinstance(module, MoeLoraLayer | nn.ParameterDict | _ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def warn_of_untouched_experts(model: nn.Module) -> None:
    """Says which expert parameters "all-linear" leaves untouched and what share of the model they are.

    Warns:
        UserWarning: one for all of them, with layer numbers written as *; none if there are none.
    """
    found = untouched_experts(model)
    if not found:
        return
    kinds = sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in found})
    total = sum(p.numel() for name, p in model.named_parameters() if ".moe_lora_" not in name)
    warnings.warn(
        f"all-linear leaves the fused experts of the base model untouched: {', '.join(kinds)} ({len(found)} "
        f"parameters, {sum(found.values()) / total:.1%} of the base model). They are 3-D parameters and no linear "
        "layers, so the adapter does not train them",
        UserWarning,
        stacklevel=2,
    )
