"""The argument `adapter_names` of forward and generate: another adapter for every sample of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from moe_lora_interop.peft_tuner.layer import BASE_ADAPTER, Linear
from moe_lora_interop.peft_tuner.refusals import MIXED_BATCH_REFUSAL
from moe_lora_interop.peft_tuner.shared_router import SharedRouter


@contextmanager
def mixed_batch(tuner: nn.Module, model: nn.Module, adapter_names: list[str], beams: int) -> Iterator[None]:
    """Hands the names to every layer (PEFT's LoRA does it this way); beam search repeats the decoder's inputs."""
    get_encoder = getattr(model, "get_encoder", None)  # transformers: the model itself if it has no encoder
    encoder = get_encoder() if get_encoder is not None else None
    in_encoder = set() if encoder is None or encoder is model else set(encoder.modules())
    repeated = [name for name in adapter_names for _ in range(beams)]
    handles = [
        module.register_forward_pre_hook(
            partial(_pass_on, list(adapter_names) if module in in_encoder else repeated), with_kwargs=True
        )
        for module in tuner.modules()
        if isinstance(module, Linear | AuxiliaryTrainingWrapper)
    ]
    paused = [m for m in tuner.modules() if isinstance(m, SharedRouter) and not m.disable_adapters]
    for router in paused:  # those of adapters that are active otherwise
        router._disable_adapters = True
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for router in paused:
            router._disable_adapters = False


def check_adapter_names(tuner: nn.Module, adapter_names: list[str]) -> None:
    """In PEFT's words, which users know from LoRA.

    Raises:
        ValueError: the model is in training mode, or an adapter is unknown or has routers beside the layers.
    """
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    known = {n: c for m in tuner.modules() if isinstance(m, Linear) for n, c in m.moe_lora_config.items()}
    unknown = sorted(set(adapter_names) - known.keys() - {BASE_ADAPTER})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)} "
            f"(this model has {', '.join(sorted(known))})"
        )
    for name in sorted(set(adapter_names) - {BASE_ADAPTER}):
        config = known[name]
        if config.scope != "linear" or config.router_input == "task":
            raise ValueError(
                MIXED_BATCH_REFUSAL.format(name=name, scope=config.scope, router_input=config.router_input)
            )


def _pass_on(names: list[str], _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict]:
    return args, {**kwargs, "adapter_names": names}
