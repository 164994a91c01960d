"""The routers' auxiliary loss in transformers' Trainer and in TRL's trainers, as a mixin that imports neither.

    class Trainer(AuxLossMixin, transformers.Trainer): ...
    class Trainer(AuxLossMixin, trl.SFTTrainer): ...
    class Trainer(AuxLossMixin, trl.DPOTrainer): ...

Nothing to add when router_aux_loss_coef and router_z_loss_coef of the adapter are zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lora_interop.peft_tuner.layer import MoeLoraLayer
from moe_lora_interop.peft_tuner.losses import moe_lora_aux_loss
from moe_lora_interop.peft_tuner.tokens import decoder_mask

REFERENCE = "ref"
"""The adapter that TRL adds as the frozen reference when it is given a PeftModel."""


class AuxLossMixin:
    """Adds `moe_lora_aux_loss` of every training forward to the loss. Stands before the trainer among the bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        complete_reference_adapter(self.model)  # type: ignore[attr-defined]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's own loss plus the auxiliary loss, averaged over the forwards that it ran."""
        with collected_aux_losses(model) as losses:
            result = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if not losses:
            return result
        aux = torch.stack(losses).mean() / self._accumulation_divisor(num_items_in_batch)
        if return_outputs:
            loss, outputs = result
            return loss + aux.to(loss.device), outputs
        return result + aux.to(result.device)

    def _accumulation_divisor(self, num_items_in_batch: Tensor | int | None) -> int:
        """A trainer that divides by the tokens of the whole accumulated batch does not divide by the steps again; an
        auxiliary loss is a mean per step."""
        trainer: Any = self
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or trainer.compute_loss_func is not None
        return getattr(trainer, "current_gradient_accumulation_steps", 1) if scaled else 1


@contextmanager
def collected_aux_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """The auxiliary loss of each forward with gradients that runs inside, in a list.

    Computed at once after the forward, because DPO runs the reference through the same layers afterwards, and with the
    attention masks that this forward was given, which TRL builds only inside its loss.
    """
    losses: list[Tensor] = []
    kinds = (PeftModel, PreTrainedModel)
    inner = next((m for m in model.modules() if isinstance(m, kinds)), model)  # inside DDP, compiled modules, ...

    def collect(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            masks = {"attention_mask": kwargs.get("attention_mask"), "decoder_attention_mask": decoder_mask(kwargs)}
            losses.append(moe_lora_aux_loss(module, **masks))

    handle = inner.register_forward_hook(collect, with_kwargs=True)
    try:
        yield losses
    finally:
        handle.remove()


@torch.no_grad()
def complete_reference_adapter(model: nn.Module) -> None:
    """Makes the adapter `ref` the copy of `default` that TRL means it to be.

    TRL copies the parameters with ".default." in their names; those of a ParameterDict (experts here, embeddings in
    LoRA) end in ".default" and would stay at their initial values, so that DPO would measure from another reference.
    """
    configs = getattr(model, "peft_config", None) or {}
    if REFERENCE not in configs or configs[REFERENCE] is not configs.get("default"):
        return
    for layer in model.modules():
        if isinstance(layer, MoeLoraLayer):
            for name in layer.adapter_layer_names:
                entries = getattr(layer, name)
                if "default" in entries and isinstance(entries, nn.ParameterDict):
                    entries[REFERENCE].data.copy_(entries["default"].data)
