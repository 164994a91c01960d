"""Auxiliary losses of the routers: load balancing and z loss, defined alike in JAX and PyTorch.

For every routed module m, with f, P, L and Z as in `balancing`, over the tokens except padding:

    balance = mean_m L_m                                 router_aux_loss "switch"
            = E sum_e (mean_m f_e) (mean_m P_e)          "mixtral": the modules' tokens pooled
            = mean_m of LoRAMoE's constraint             "localized"
    aux     = router_aux_loss_coef * balance + router_z_loss_coef * mean_m Z_m

z are the logits after the temperature; g the gates before routed_scaling_factor and dropout. A module is a place where
a router stands: a linear layer, a feed-forward block, or the model; for a layerwise router, each of its layers.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.peft_tuner.balancing import (
    load_balancing_loss,
    localized_balancing_loss,
    pooled_balancing_loss,
    use,
    z_loss,
)
from moe_lora_interop.peft_tuner.gating import RouterOutput
from moe_lora_interop.peft_tuner.router import MoeLoraLayer
from moe_lora_interop.peft_tuner.tokens import TokenMasks

__all__ = ["load_balancing_loss", "moe_lora_aux_loss", "z_loss"]


class Decision(NamedTuple):
    """One module's routing, whether it is by top-k, and how much each of its rows counts (None: equally)."""

    routing: RouterOutput
    by_top_k: bool
    real: Tensor | None


def moe_lora_aux_loss(
    model: nn.Module,
    attention_mask: Tensor | None = None,
    task_types: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """The auxiliary loss of the last training-mode forward, summed over the active adapters: add it to the loss.

        loss = model(**batch).loss + moe_lora_aux_loss(model, batch["attention_mask"])

    Args:
        model: any module that contains MOE_LORA layers.
        attention_mask: [batch, seq], nonzero for real tokens; None: every token counts.
        task_types: [batch], 0 or 1, for router_aux_loss "localized".
        decoder_attention_mask: in an encoder-decoder, as `attention_mask` for the decoder's tokens; `attention_mask` is
            then for the encoder's, which the keys and values of cross-attention see, too.

    Returns:
        A scalar with gradient; zero when no active adapter has a coefficient above zero or a router.

    Raises:
        RuntimeError: there was no forward in training mode, or it ran without gradients.
        ValueError: a mask does not have one entry per token that a router saw, or task_types are missing or
            others than 0 and 1.
    """
    by_adapter: dict[str, list[tuple[str, MoeLoraLayer]]] = {}
    silent: list[str] = []
    for name, layer in model.named_modules():
        if isinstance(layer, MoeLoraLayer) and not layer.disable_adapters:
            for adapter in _with_loss(layer):
                if adapter in layer.moe_lora_claim:
                    layer.moe_lora_claim[adapter].taken = True
                if adapter in layer.moe_lora_routing:
                    by_adapter.setdefault(adapter, []).append((name, layer))
                else:  # a layer that this forward left out, if others have run
                    silent.append(name)
    if silent and not by_adapter:
        raise RuntimeError(f"{silent[0]}: no routing to compute a loss from; run a forward in training mode first")
    device = next((layer.moe_lora_routing[a].logits.device for a, ls in by_adapter.items() for _, layer in ls), None)
    masks = TokenMasks(model, attention_mask, decoder_attention_mask)
    total = torch.zeros((), device=device or next(model.parameters()).device)
    for adapter, layers in by_adapter.items():
        config = layers[0][1].moe_lora_config[adapter]
        decisions = [d for name, layer in layers for d in _decisions(name, layer, adapter, masks)]
        if config.router_aux_loss_coef:
            balance = _balance(config, decisions, task_types, total.device)
            total = total + config.router_aux_loss_coef * balance
        if config.router_z_loss_coef:
            z = [z_loss(d.routing, d.real).to(total.device) for d in decisions]
            total = total + config.router_z_loss_coef * torch.stack(z).mean()
    return total


def _balance(
    config: MoeLoraConfig, decisions: list[Decision], task_types: Tensor | None, device: torch.device
) -> Tensor:
    if config.router_aux_loss == "mixtral":
        uses = [use(*decision) for decision in decisions]
        return pooled_balancing_loss([(f.to(device), p.to(device)) for f, p in uses])
    if config.router_aux_loss == "localized":
        types = _checked(task_types)
        delta = config.router_aux_loss_delta
        losses = [
            localized_balancing_loss(_for_batch(d.routing.gates, len(types)), types, delta, d.real) for d in decisions
        ]
    else:
        losses = [load_balancing_loss(*decision) for decision in decisions]
    return torch.stack([loss.to(device) for loss in losses]).mean()


def _with_loss(layer: MoeLoraLayer) -> Iterator[str]:
    """The active adapters of a layer that have a router there and a coefficient."""
    for adapter in layer.active_adapters:
        config = layer.moe_lora_config.get(adapter)
        if config is not None and (config.router_aux_loss_coef or config.router_z_loss_coef):
            if layer.router_parameters(adapter):
                yield adapter


def _decisions(name: str, layer: MoeLoraLayer, adapter: str, masks: TokenMasks) -> Iterator[Decision]:
    """What was decided here, for each of the modules that the router served."""
    config, routing = layer.moe_lora_config[adapter], layer.moe_lora_routing[adapter]
    trains = torch.is_grad_enabled() and any(p.requires_grad for p in layer.router_parameters(adapter))
    if trains and not routing.logits.requires_grad:
        raise RuntimeError(
            f"{name}: the forward ran without gradients, so the auxiliary loss would not train the router; with "
            "gradient checkpointing pass {'use_reentrant': False} as its kwargs"
        )
    by_sequence = config.router_input == "task"
    mask = masks.of(name, layer, 0 if by_sequence else len(routing.logits))
    real = None if mask is None else _real(name, routing, mask, rows_are_sequences=by_sequence)
    by_top_k = layer.moe_lora_module_config[adapter].top_k is not None
    served = zip(*(field.unbind(1) for field in routing), strict=True) if config.layerwise else [routing]
    for fields in served:
        yield Decision(RouterOutput(*fields), by_top_k, real)


def _real(name: str, routing: RouterOutput, attention_mask: Tensor, rows_are_sequences: bool) -> Tensor:
    """How many tokens each row stands for: [row]."""
    rows, batch = len(routing.logits), len(attention_mask)
    real = (attention_mask != 0).to(routing.logits)
    if rows_are_sequences and batch % rows == 0:
        return real.reshape(rows, -1).sum(1)
    if rows_are_sequences or attention_mask.numel() != rows:
        seen = "sequences" if rows_are_sequences else "tokens"
        raise ValueError(
            f"{name}: attention_mask has shape {list(attention_mask.shape)}, expected [batch, seq] with one entry for "
            f"each of the {rows} {seen} that this router saw"
        )
    return real.reshape(-1)


def _checked(task_types: Tensor | None) -> Tensor:
    if task_types is None:
        raise ValueError("router_aux_loss is localized: pass task_types=[batch], 0 or 1, to moe_lora_aux_loss")
    types = torch.as_tensor(task_types)
    if types.ndim != 1 or not ((types == 0) | (types == 1)).all():
        raise ValueError(f"task_types: found {types.tolist()}, expected a list [batch] of 0 and 1")
    return types


def _for_batch(gates: Tensor, batch: int) -> Tensor:
    """Rows that are a multiple of the batch."""
    if len(gates) % batch:
        raise ValueError(
            f"task_types has {batch} entries, expected one for each sample ({len(gates)} rows were routed)"
        )
    return gates
