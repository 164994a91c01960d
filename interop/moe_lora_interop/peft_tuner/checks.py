"""What has to fit between a config and a model before anything is wrapped."""

import re
import warnings
from collections.abc import Iterable, Iterator

from torch import nn

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.modules import order_problems, router_owners
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_interop.peft_tuner.first_pass import unfit
from moe_lora_interop.peft_tuner.layer import Linear, features
from moe_lora_interop.peft_tuner.model_router import ModelRouter
from moe_lora_interop.peft_tuner.router import MoeLoraLayer, RouterLinear, RouterTable
from moe_lora_interop.peft_tuner.shared_router import CHILD, BlockRouter
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


def check_adapter_name(adapter_name: str, names: Iterable[str]) -> None:
    """PEFT separates adapters in a state dict by looking for their names between the dots of its keys, and keeps their
    parameters in modules by these names.

    Args:
        names: of the model's tensors and modules.

    Raises:
        ValueError: the name is a number, a part of a tensor's name, empty, has a dot, or is taken in torch's modules.
    """
    is_taken = any(hasattr(container, adapter_name) for container in (nn.ModuleDict(), nn.ParameterDict()))
    if not adapter_name or "." in adapter_name or is_taken:
        raise ValueError(
            f"adapter name {adapter_name!r}: torch cannot have a module of this name (it is empty, has a dot, or is a "
            f"name of torch's own). Choose another name, for example adapter_{adapter_name.replace('.', '_')}"
        )
    if adapter_name.isdigit():
        raise ValueError(
            f"adapter name {adapter_name!r} is a number, like the model's layers: PEFT would drop layer {adapter_name} "
            f"from the files of other adapters. Choose another name, for example adapter_{adapter_name}"
        )
    own = (*Linear.adapter_layer_names, *MoeLoraLayer.adapter_layer_names, CHILD)
    wrappers = ("modules_to_save", "original_module", "token_adapter")  # PEFT's own, around modules saved whole
    taken = {"base_model", "model", "base_layer", "weight", "bias", *wrappers, *own}
    for name in names:
        taken.update(name.split("."))
    if adapter_name in taken:
        raise ValueError(
            f"adapter name {adapter_name!r} is also a part of this model's parameter names: PEFT would drop those "
            f"parameters from the files of other adapters. Choose another name, for example adapter_{adapter_name}"
        )


def check_own_routers(model: nn.Module, adapter_name: str) -> None:
    """A file holds the routers' weights and the rule as the config has it, so it can hold only our own routers.

    Raises:
        CheckpointError: a tuner layer or a router of the adapter is of another class, or computes otherwise.
    """
    problems = [
        f"{'.'.join(filter(None, (path, name)))}: found {_class(found)}, expected {_class_name(wanted)}"
        for path, layer in model.named_modules()
        if isinstance(layer, MoeLoraLayer) and adapter_name in layer.moe_lora_config
        for name, found, wanted in _parts(layer, adapter_name)
        if not _computes_as(found, wanted)
    ]
    if problems:
        raise CheckpointError(
            f"adapter {adapter_name!r} has routers of your own, which no file can describe (it would be read as the "
            "config's rule): put ours back, or save the whole model with torch.save",
            problems,
        )


def _parts(layer: MoeLoraLayer, adapter_name: str) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
    """(name, module, the class that it must have) of the layer itself and of all that decides in it."""
    yield "", layer, next((kind for kind in (Linear, BlockRouter, ModelRouter) if isinstance(layer, kind)), Linear)
    for name in MoeLoraLayer.adapter_layer_names:
        entry = layer.entry(name, adapter_name)
        wanted = RouterTable if name == "moe_lora_task_embedding" else RouterLinear
        for module in entry if type(entry) is nn.ModuleList else [entry]:
            if adapter_name in getattr(layer, name):
                yield f"{name}.{adapter_name}", module, wanted


def _computes_as(module: nn.Module, wanted: type[nn.Module]) -> bool:
    """Of this class, or what torch's sharding derives from it; with its forward, or accelerate's around it."""
    kinds = [kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.distributed.")]
    return kinds[0] is wanted and ("forward" not in vars(module) or hasattr(module, "_hf_hook"))


def _class(module: nn.Module) -> str:
    return _class_name(type(module)) + (" with a forward of its own" if "forward" in vars(module) else "")


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def untouched_experts(model: nn.Module) -> dict[str, int]:
    """{path of a parameter that holds all experts of a layer of the base model: its size}."""
    return {
        f"{path}.{name}" if path else name: parameter.numel()
        for path, module in model.named_modules()
        if not isinstance(module, MoeLoraLayer | nn.ParameterDict | nn.Linear)
        for name, parameter in module.named_parameters(recurse=False)
        if _holds_experts(module, parameter)
    }


def _holds_experts(module: nn.Module, parameter: nn.Parameter) -> bool:
    """In transformers' models: [expert, ., .] in a module of the class ...Experts..., or in one that counts as many
    experts (num_experts); DBRX has [(expert .), .] in a DbrxExpertGLU. Class tokens and positions are [1, ., .]."""
    counts = [v for k, v in vars(module).items() if k.endswith(("experts", "experts_")) and isinstance(v, int)]
    if parameter.ndim == 3:
        return "Experts" in type(module).__name__ or len(parameter) in counts
    is_expert = parameter.ndim == 2 and "Expert" in type(module).__name__
    return is_expert and any(1 < count < len(parameter) and len(parameter) % count == 0 for count in counts)


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
        f"parameters, {sum(found.values()) / total:.1%} of the base model). Each holds all experts of a layer and is "
        "no linear layer, so the adapter does not train them",
        UserWarning,
        stacklevel=2,
    )
