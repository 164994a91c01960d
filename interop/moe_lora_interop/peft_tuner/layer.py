"""A linear layer with a mixture of LoRA experts beside it."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig
from moe_lora_interop.peft_tuner.mixing import gated_sum, mixed_factors, scaled
from moe_lora_interop.peft_tuner.offload import execution_device
from moe_lora_interop.peft_tuner.router import MoeLoraLayer
from moe_lora_interop.peft_tuner.shared import per_token
from moe_lora_interop.peft_tuner.slots import Slots

BASE_ADAPTER = "__base__"
"""In `adapter_names`: no adapter for this sample (PEFT's word)."""


def unsupported(module: nn.Module) -> str | None:
    """Why an adapter cannot wrap this layer, or None if it can."""
    kind = type(module).__name__
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"{kind}: nn.MultiheadAttention reads its weight without calling it, so an adapter would have no effect"
    if not isinstance(module, nn.Linear | Conv1D):
        return f"{kind}: expected torch.nn.Linear or transformers' Conv1D"
    return None


def features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a layer that is not `unsupported`."""
    base: Any = layer
    return (base.nx, base.nf) if isinstance(base, Conv1D) else (base.in_features, base.out_features)


class Linear(MoeLoraLayer):
    """y = W0 x + the deltas of the active adapters. Wraps torch.nn.Linear and transformers' Conv1D.

    moe_lora_A            [expert, rank, in]   slice e is a stock PEFT lora_A.weight; [1, rank, in] with shared_lora_A
    moe_lora_B            [expert, out, rank]  slice e is a stock PEFT lora_B.weight
    moe_lora_layer_index  this layer's place among those of a layerwise router
    moe_lora_is_last      this layer's output is that of its feed-forward block (scope ffn); it may have no A and B
    and a router in scope linear; see `MoeLoraLayer`. A module with one expert has none: it is plain LoRA.

    The rank axis has the size of the largest expert; the others are padded with zeros, which stay zero in training
    because the gradient of a zero row of A is zero where the column of B is zero, and the other way round.
    """

    adapter_layer_names = ("moe_lora_A", "moe_lora_B", *MoeLoraLayer.adapter_layer_names)
    other_param_names = (*MoeLoraLayer.other_param_names, "moe_lora_layer_index", "moe_lora_is_last")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.moe_lora_A = nn.ParameterDict()
        self.moe_lora_B = nn.ParameterDict()
        self.moe_lora_layer_index: dict[str, int] = {}
        self.moe_lora_is_last: dict[str, bool] = {}
        self.in_features, self.out_features = features(self.get_base_layer())

    def update_layer(self, adapter_name: str, config: MoeLoraConfig, module: ModuleConfig) -> None:
        """Creates the parameters of one adapter, in the base layer's dtype (PEFT then casts bf16 and fp16 to fp32)."""
        self.moe_lora_config[adapter_name] = config
        self.moe_lora_module_config[adapter_name] = module
        dtype = self.weight.dtype if self.weight.dtype.is_floating_point else torch.get_default_dtype()
        experts, rank = module.num_experts, module.rank
        self.moe_lora_A[adapter_name] = nn.Parameter(
            torch.empty(1 if module.shared_lora_A else experts, rank, self.in_features, dtype=dtype)
        )
        self.moe_lora_B[adapter_name] = nn.Parameter(torch.empty(experts, self.out_features, rank, dtype=dtype))
        self.reset_moe_lora_parameters(adapter_name, config.init_lora_weights)
        if module.has_router and config.scope == "linear":
            codes = config.router_input == "expert_activations"
            inputs = self.moe_lora_A[adapter_name][..., 0].numel() if codes else self.in_features
            self.add_router(adapter_name, inputs, dtype)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_moe_lora_parameters(self, adapter_name: str, init_lora_weights: bool) -> None:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)), which is PEFT's kaiming_uniform(a=sqrt(5)) per expert; B = 0, or normal with
        std 1/rank when `init_lora_weights` is False."""
        lora_a, lora_b = self.moe_lora_A[adapter_name], self.moe_lora_B[adapter_name]
        module = self.moe_lora_module_config[adapter_name]
        nn.init.uniform_(lora_a, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features))
        if init_lora_weights:
            nn.init.zeros_(lora_b)
        else:
            nn.init.normal_(lora_b, std=1 / module.rank)
        for expert, rank in enumerate(module.ranks):  # the padding; shared_lora_A has equal ranks, so none
            lora_b[expert, :, rank:] = 0
            if not module.shared_lora_A:
                lora_a[expert, rank:] = 0

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Like PEFT's, but never rounds: PEFT casts an fp32 adapter that low_cpu_mem_usage has just loaded to the
        dtype of a bf16 base, and back up to fp32 afterwards."""
        weight = self.weight
        device = device or (execution_device(self.get_base_layer()) if weight.is_meta else weight.device)
        for name in self.adapter_layer_names:
            entries = getattr(self, name)
            if adapter_name not in entries:
                continue
            entry = entries[adapter_name]
            if any(p.is_meta for p in ([entry] if isinstance(entry, Tensor) else entry.parameters())):
                continue
            own = entry.dtype if isinstance(entry, Tensor) else entry.weight.dtype
            dtype = torch.promote_types(own, weight.dtype) if weight.dtype.is_floating_point else own
            entries[adapter_name] = entry.to(device, dtype)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        self.moe_lora_routing = {}
        if adapter_names is None and not self.disable_adapters:
            for name in self.active_adapters:
                if name in self.moe_lora_shared and self.moe_lora_config[name].scope == "ffn":
                    return self._forward_in_block(name, x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if adapter_names is not None:
            return self._add_mixed_batch(result, x, adapter_names)
        for name in self.active_adapters:
            if name in self.moe_lora_A:
                result = result + self._delta(name, x).to(result.dtype)
        return result

    def _delta(self, adapter_name: str, x: Tensor) -> Tensor:
        """sum_e routed_scaling_factor g_e s_e B_e A_e x for x [..., in], in the adapter's dtype: [..., out].

        Two GEMMs over all experts at once: A as [(expert rank), in], B as [(expert rank), out], and between them the
        gates on the rank axis of each expert. The router's product is separate, because it is always computed in at
        least fp32 and without dropout; joining it to A's GEMM measured no faster on CPU.
        """
        config, module = self.moe_lora_config[adapter_name], self.moe_lora_module_config[adapter_name]
        lora_a, lora_b = self._factors(adapter_name)
        # a 2-D x as it is: a view of it would have autograd add up its gradients in new memory
        tokens = x if x.ndim == 2 else x.reshape(-1, self.in_features)
        dropped = self._dropped(adapter_name, tokens)
        if not module.has_router:  # in the order of stock LoRA, to which this is bit-equal
            delta = F.linear(F.linear(dropped, lora_a[0]), lora_b[0]) * module.scalings[0]
            return delta.reshape(*x.shape[:-1], self.out_features)
        if config.mix == "weights":
            gates = self._gates(adapter_name, tokens).reshape(len(tokens), config.n_splits, module.num_experts)
            delta = mixed_factors(dropped, gates, lora_a, lora_b) * module.scalings[0]
        else:
            codes = F.linear(dropped, lora_a.flatten(0, 1))
            gates = self._gates(adapter_name, codes.relu() if config.router_input == "expert_activations" else tokens)
            delta = gated_sum(codes.unflatten(1, lora_a.shape[:2]), scaled(gates, module.scalings), lora_b)
        return delta.reshape(*x.shape[:-1], self.out_features)

    def _factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A and B."""
        if self.moe_lora_A[adapter_name].is_meta:
            self.require_values(adapter_name)
        return self.moe_lora_A[adapter_name], self.moe_lora_B[adapter_name]

    def _dropped(self, adapter_name: str, x: Tensor) -> Tensor:
        """The experts' input."""
        x = self._cast_input_dtype(x, self.moe_lora_A[adapter_name].dtype)
        return F.dropout(x, self.moe_lora_config[adapter_name].lora_dropout, self.training)

    def _gates(self, adapter_name: str, tokens: Tensor) -> Tensor:
        """[token, expert] or [token, split, expert], from wherever the router of this layer stands.

        Args:
            tokens: what that router reads, if it stands here.
        """
        config = self.moe_lora_config[adapter_name]
        if config.scope == "model":  # the router has applied expert_dropout already
            gates = self.moe_lora_shared[adapter_name].get()
            gates = gates[:, self.moe_lora_layer_index[adapter_name]] if config.layerwise else gates
            return per_token(gates, len(tokens)).to(tokens.device)
        if config.router_input == "task":
            routing = self.route_tasks(adapter_name, self.moe_lora_shared[adapter_name].get())
            return self.weights(adapter_name, per_token(routing.gates, len(tokens)).to(tokens.device))
        return self.weights(adapter_name, self.route(adapter_name, tokens).gates)

    def _forward_in_block(self, adapter_name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One layer of a routed feed-forward block: x [(slot,) ..., in] -> [(slot,) ..., out], without a slot axis for
        the block's last layer. The slots are those of `moe_lora_interop.peft_tuner.slots`."""
        slots: Slots = self.moe_lora_shared[adapter_name].get()
        is_last, has_experts = self.moe_lora_is_last[adapter_name], adapter_name in self.moe_lora_A
        module = self.moe_lora_module_config[adapter_name]
        layer_input = slots.mix(slots.flat(x)) if is_last else x
        result = self.base_layer(layer_input, *args, **kwargs)
        if not has_experts:
            return result
        if not module.has_router:  # the same plain LoRA for every expert, so it commutes with the gated sum
            return result + self._delta(adapter_name, layer_input).to(result.dtype)
        dropped = self._dropped(adapter_name, slots.flat(x))
        factors = self._factors(adapter_name)
        if is_last:
            return result + slots.gated_sum(dropped, *factors, module.scalings).to(result.dtype)
        return slots.add_deltas(result, dropped, *factors, module.scalings)

    def _add_mixed_batch(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        """Adds to each sample the delta of the adapter that `adapter_names` gives it."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        for name in sorted(set(adapter_names) - {BASE_ADAPTER}):
            if name in self.moe_lora_A:
                samples = [i for i, wanted in enumerate(adapter_names) if wanted == name]
                result[samples] += self._delta(name, x[samples]).to(result.dtype)
        return result

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()
