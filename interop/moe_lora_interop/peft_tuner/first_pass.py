"""The first of two passes: the last hidden state, without gradient, of the base model or with given gates."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora_interop.peft_tuner.router import MoeLoraLayer

# arguments of a model with a head that its base transformer does not want in a first pass
_NOT_PASSED_ON = frozenset(
    "labels logits_to_keep num_items_in_batch use_cache past_key_values cache output_attentions output_hidden_states "
    "output_router_logits return_dict start_positions end_positions".split()
)


def unfit(model: Any) -> str | None:
    """Why a model cannot make a first pass, or None if it can."""
    config: Any = getattr(model, "config", None)
    if not isinstance(getattr(model, "base_model", None), nn.Module) or not hasattr(config, "get_text_config"):
        return f"{type(model).__name__}: expected a transformers model, whose last hidden state the router can read"
    if config.is_encoder_decoder:
        return f"{type(model).__name__}: an encoder-decoder, expected a model with one stack of layers"
    return None


def call_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """{name: value} of a call of the model, extra keyword arguments included."""
    if not args:
        return kwargs
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return dict(zip(names, args, strict=False)) | kwargs


def batch_size(arguments: dict[str, Any]) -> int:
    """Rows of the batch of such a call."""
    first = (arguments.get("input_ids"), arguments.get("inputs_embeds"), *arguments.values())
    return len(next(value for value in first if isinstance(value, Tensor)))


def last_hidden_state(model: Any, arguments: dict[str, Any], *, with_adapters: bool = False) -> Tensor:
    """[batch, seq, hidden] after the final norm, of the base transformer of a transformers model."""
    transformer = model.base_model
    passed_on = {name: value for name, value in arguments.items() if name not in _NOT_PASSED_ON}
    if "use_cache" in inspect.signature(transformer.forward).parameters:
        passed_on["use_cache"] = False
    with torch.no_grad(), nullcontext() if with_adapters else _adapters_off(model):
        return transformer(**passed_on)[0]


@contextmanager
def _adapters_off(model: nn.Module) -> Iterator[None]:
    """Off for a forward only; unlike PEFT's verb, it leaves requires_grad alone."""
    layers = [m for m in model.modules() if isinstance(m, MoeLoraLayer) and not m.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
