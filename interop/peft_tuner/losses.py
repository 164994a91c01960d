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


def load_balancing_loss(routing: Routing, counts_kept: bool, real: Tensor | None = None) -> Tensor:
    """L_m of one module. `counts_kept` selects the top-k form of f; `real` [token] is 1 for real tokens, else 0."""
    probabilities = routing.scores / routing.scores.sum(-1, keepdim=True)
    share = routing.kept.to(probabilities.dtype) if counts_kept else routing.gates
    return probabilities.shape[-1] * (_token_mean(share, real) * _token_mean(probabilities, real)).sum()


def z_loss(routing: Routing, real: Tensor | None = None) -> Tensor:
    """Z_m of one module; `real` as in `load_balancing_loss`."""
    return _token_mean(routing.logits.logsumexp(-1).square(), real)


def _token_mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Mean over the first axis of the real tokens, zero without any; by weights, because a selection of tokens would
    have a size that an accelerator and a compiler do not know beforehand."""
    if real is None:
        return values.mean(0)
    return torch.tensordot(real, values, dims=1) / real.sum().clamp(min=1)


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
        balance, z = [], []
        for name, layer in layers:
            routing, top_k = layer.moe_lora_routing[adapter], layer.moe_lora_module_config[adapter].top_k
            _check_gradient(name, layer, adapter)
            real = None if attention_mask is None else _real_tokens(name, routing, attention_mask)
            balance.append(load_balancing_loss(routing, top_k is not None, real))
            z.append(z_loss(routing, real))
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


def _check_gradient(name: str, layer: MoeLoraLayer, adapter: str) -> None:
    trains = torch.is_grad_enabled() and layer.moe_lora_router[adapter].weight.requires_grad
    if trains and not layer.moe_lora_routing[adapter].logits.requires_grad:
        raise RuntimeError(
            f"{name}: the forward ran without gradients, so the auxiliary loss would not train the router; with "
            "gradient checkpointing pass {'use_reentrant': False} as its kwargs"
        )


def _real_tokens(name: str, routing: Routing, attention_mask: Tensor) -> Tensor:
    """attention_mask as weights [token]."""
    tokens = routing.logits.shape[0]
    if attention_mask.numel() != tokens:
        raise ValueError(
            f"{name}: attention_mask has shape {list(attention_mask.shape)}, expected [batch, seq] with one entry for "
            f"each of the {tokens} tokens that this router saw"
        )
    return (attention_mask.reshape(-1) != 0).to(routing.logits)
