"""Mixture-of-experts base models keep all experts of a layer in one 3-D parameter, which no adapter can wrap."""

import re
import warnings

from torch import nn
from torch.nn.modules.conv import _ConvNd

from interop.peft_tuner.router import MoeLoraLayer


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
