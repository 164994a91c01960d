"""Auxiliary losses of the routers: load balancing and z loss, defined alike in JAX and PyTorch.

For every routed module m with E experts, over the tokens t that are not padding:

    P_e   = mean_t of softmax(z)_e, softmax(|z|)_e or sigmoid(z)_e / sum_e sigmoid(z)_e
    f_e   = (tokens that keep expert e) / (tokens)       top-k routing; sum_e f_e = k
          = mean_t g_e                                   dense or threshold routing, differentiable
    L_m   = E * sum_e f_e P_e
    Z_m   = mean_t logsumexp_e(z)^2
    aux   = router_aux_loss_coef * mean_m L_m + router_z_loss_coef * mean_m Z_m

z are the logits after the temperature; g the gates before routed_scaling_factor and dropout. With top-k, L of a single
module is transformers' load_balancing_loss_func of Mixtral (Switch Transformers, arXiv:2101.03961; the z loss is from
ST-MoE, arXiv:2202.08906).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from interop.peft_tuner.gating import Routing
from interop.peft_tuner.layer import MoeLoraLayer


def load_balancing_loss(routing: Routing, counts_kept: bool) -> Tensor:
    """L_m of one module; `counts_kept` selects the top-k form of f."""
    probabilities = routing.scores / routing.scores.sum(-1, keepdim=True)
    share = routing.kept.to(probabilities.dtype) if counts_kept else routing.gates
    return probabilities.shape[-1] * (share.mean(0) * probabilities.mean(0)).sum()


def z_loss(routing: Routing) -> Tensor:
    """Z_m of one module."""
    return routing.logits.logsumexp(-1).square().mean()


def moe_lora_aux_loss(model: nn.Module, attention_mask: Tensor | None = None) -> Tensor:
    """The auxiliary loss of the last training-mode forward, summed over the active adapters: add it to the loss.

        loss = model(**batch).loss + moe_lora_aux_loss(model, batch["attention_mask"])

    Args:
        model: any module that contains MOE_LORA layers.
        attention_mask: [batch, seq], nonzero for real tokens; None: every token counts.

    Returns:
        A scalar with gradient; zero when no active adapter has a coefficient above zero or a router.

    Raises:
        RuntimeError: there was no forward in training mode, or it ran without gradients.
        ValueError: attention_mask does not have one entry per token that a router saw.
    """
    by_adapter: dict[str, list[tuple[str, MoeLoraLayer]]] = {}
    silent: list[str] = []
    for name, layer in model.named_modules():
        if isinstance(layer, MoeLoraLayer) and not layer.disable_adapters:
            for adapter in _with_loss(layer):
                if adapter in layer.moe_lora_routing:
                    by_adapter.setdefault(adapter, []).append((name, layer))
                else:  # a layer that this forward left out, if others have run
                    silent.append(name)
    if silent and not by_adapter:
        raise RuntimeError(f"{silent[0]}: no routing to compute a loss from; run a forward in training mode first")
    total = torch.zeros((), device=next(model.parameters()).device)
    for adapter, layers in by_adapter.items():
        config = layers[0][1].moe_lora_config[adapter]
        routings = [_real_tokens(name, layer, adapter, attention_mask) for name, layer in layers]
        balance = [
            load_balancing_loss(routing, counts_kept=layer.moe_lora_module_config[adapter].top_k is not None)
            for (_, layer), routing in zip(layers, routings, strict=True)
        ]
        z = [z_loss(routing) for routing in routings]
        for coefficient, losses in ((config.router_aux_loss_coef, balance), (config.router_z_loss_coef, z)):
            if coefficient:
                total = total + coefficient * torch.stack([loss.to(total.device) for loss in losses]).mean()
    return total


def _with_loss(layer: MoeLoraLayer) -> Iterator[str]:
    """The active adapters of a layer that have a router and a coefficient."""
    for adapter in layer.active_adapters:
        config = layer.moe_lora_config.get(adapter)
        if config is not None and adapter in layer.moe_lora_router:
            if config.router_aux_loss_coef or config.router_z_loss_coef:
                yield adapter


def _real_tokens(name: str, layer: MoeLoraLayer, adapter: str, attention_mask: Tensor | None) -> Routing:
    routing = layer.moe_lora_routing[adapter]
    if (
        torch.is_grad_enabled()
        and layer.moe_lora_router[adapter].weight.requires_grad
        and not routing.logits.requires_grad
    ):
        raise RuntimeError(
            f"{name}: the forward ran without gradients, so the auxiliary loss would not train the router; with gradient "
            "checkpointing pass gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    if attention_mask is None:
        return routing
    if attention_mask.numel() != routing.logits.shape[0]:
        raise ValueError(
            f"{name}: attention_mask has shape {list(attention_mask.shape)}, expected [batch, seq] with one entry for each "
            f"of the {routing.logits.shape[0]} tokens that this router saw"
        )
    real = attention_mask.reshape(-1).to(routing.logits.device) != 0
    return Routing(*(value[real] for value in routing))
