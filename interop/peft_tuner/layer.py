"""A linear layer with a mixture of LoRA experts beside it."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from interop.config import ModuleConfig, MoeLoraConfig
from interop.peft_tuner.gating import Routing, route

BASE_ADAPTER = "__base__"
"""In `adapter_names`: no adapter for this sample (PEFT's word)."""

MERGE_REFUSAL = (
    "a MOE_LORA adapter cannot be merged: its router weighs the experts anew for every token, so no single weight "
    "matrix equals it. Keep the PeftModel as it is (unload() gives the base model back), or write an ordinary LoRA "
    "with fixed gates, which can be merged: moe-lora export SRC DST --as lora"
)


def unsupported(module: nn.Module) -> str | None:
    """Why an adapter cannot wrap this layer, or None if it can."""
    kind = type(module).__name__
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"{kind}: nn.MultiheadAttention reads its weight without calling it, so an adapter would have no effect"
    if not isinstance(module, nn.Linear | Conv1D):
        return f"{kind}: expected torch.nn.Linear or transformers' Conv1D"
    return None


class MoeLoraLayer(nn.Module, BaseTunerLayer):
    """The adapter's state on one layer, keyed by adapter name; every attribute starts with the prefix `moe_lora_`.

    moe_lora_A          [expert, rank, in]      [1, rank, in] with shared_lora_A; slice e is a stock PEFT lora_A.weight
    moe_lora_B          [expert, out, rank]     slice e is a stock PEFT lora_B.weight
    moe_lora_router     Linear(in, expert)      absent for a module with one expert, which is plain LoRA
    moe_lora_threshold  Linear(in, 1)           only with adaptive_threshold
    moe_lora_routing    {adapter: Routing}      of the last forward in training mode, for losses and plots

    The rank axis has the size of the largest expert; the others are padded with zeros, which stay zero in training
    because the gradient of a zero row of A is zero where the column of B is zero, and the other way round.
    """

    adapter_layer_names = ("moe_lora_A", "moe_lora_B", "moe_lora_router", "moe_lora_threshold")
    other_param_names = ("moe_lora_config", "moe_lora_module_config")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.moe_lora_A = nn.ParameterDict()
        self.moe_lora_B = nn.ParameterDict()
        self.moe_lora_router = nn.ModuleDict()
        self.moe_lora_threshold = nn.ModuleDict()
        self.moe_lora_config: dict[str, MoeLoraConfig] = {}
        self.moe_lora_module_config: dict[str, ModuleConfig] = {}
        self.moe_lora_routing: dict[str, Routing] = {}
        base: Any = self.get_base_layer()
        self.in_features: int = base.nx if isinstance(base, Conv1D) else base.in_features
        self.out_features: int = base.nf if isinstance(base, Conv1D) else base.out_features

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
        if module.has_router:
            self.moe_lora_router[adapter_name] = nn.Linear(
                self.in_features, experts, bias=config.router_bias, dtype=dtype
            )
            if config.adaptive_threshold:
                self.moe_lora_threshold[adapter_name] = nn.Linear(self.in_features, 1, dtype=dtype)
        self.reset_moe_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_moe_lora_parameters(self, adapter_name: str, init_lora_weights: bool) -> None:
        """A ~ U(-1/sqrt(in), 1/sqrt(in)), which is PEFT's kaiming_uniform(a=sqrt(5)) per expert; B = 0, or normal with
        std 1/rank when `init_lora_weights` is False; router weights ~ N(0, 0.02^2) and biases 0, as in JAX; a learned
        threshold starts at zero, so tau = threshold / 2 for every token."""
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
        for linears, std in ((self.moe_lora_router, 0.02), (self.moe_lora_threshold, 0.0)):
            if adapter_name in linears:
                linear: Any = linears[adapter_name]
                nn.init.normal_(linear.weight, std=std)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Like PEFT's, but never rounds: PEFT casts an fp32 adapter that low_cpu_mem_usage has just loaded to the
        dtype of a bf16 base, and back up to fp32 afterwards."""
        weight = self.weight
        for name in self.adapter_layer_names:
            entries = getattr(self, name)
            if adapter_name not in entries or any(p.is_meta for p in entries.parameters()):
                continue
            entry = entries[adapter_name]
            own = entry.dtype if isinstance(entry, Tensor) else entry.weight.dtype
            dtype = torch.promote_types(own, weight.dtype) if weight.dtype.is_floating_point else own
            entries[adapter_name] = entry.to(weight.device if device is None else device, dtype)

    def _delta(self, adapter_name: str, x: Tensor) -> Tensor:
        """sum_e routed_scaling_factor g_e s_e B_e A_e x for x [..., in], in the adapter's dtype: [..., out].

        Two GEMMs over all experts at once: A as [(expert rank), in], B as [(expert rank), out], and between them the
        gates on the rank axis of each expert. The router's product is separate, because it is always computed in at
        least fp32 and without dropout; joining it to A's GEMM measured no faster on CPU.
        """
        config, module = self.moe_lora_config[adapter_name], self.moe_lora_module_config[adapter_name]
        lora_a, lora_b = self.moe_lora_A[adapter_name], self.moe_lora_B[adapter_name]
        tokens = x.reshape(-1, self.in_features)
        dropped = F.dropout(self._cast_input_dtype(tokens, lora_a.dtype), config.lora_dropout, self.training)
        hidden = F.linear(dropped, lora_a.flatten(0, 1))
        if not module.has_router:  # in the order of stock LoRA, to which this is bit-equal
            delta = F.linear(hidden, lora_b[0]) * module.scalings[0]
            return delta.reshape(*x.shape[:-1], self.out_features)
        routing = self._route(adapter_name, tokens)
        if self.training:
            self.moe_lora_routing[adapter_name] = routing
        gates = F.dropout(routing.gates, config.expert_dropout, self.training)
        weights = config.routed_scaling_factor * _scaled(gates, module.scalings)
        hidden = hidden.reshape(len(tokens), len(lora_a), module.rank) * weights.to(hidden.dtype)[:, :, None]
        delta = hidden.flatten(1) @ lora_b.transpose(1, 2).flatten(0, 1)
        return delta.reshape(*x.shape[:-1], self.out_features)

    def _route(self, adapter_name: str, tokens: Tensor) -> Routing:
        """The gates of every token, computed in fp32 (or wider) whatever the dtype of input, adapter and autocast."""
        config = self.moe_lora_config[adapter_name]
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            x = tokens.to(dtype)
            if self.training and config.router_jitter_noise:
                x = x * torch.empty_like(x).uniform_(1 - config.router_jitter_noise, 1 + config.router_jitter_noise)
            logits = _linear(self.moe_lora_router[adapter_name], x) / config.router_temperature
            tau: Tensor | float | None = config.threshold
            if config.adaptive_threshold and tau is not None:
                tau = tau * _linear(self.moe_lora_threshold[adapter_name], x).sigmoid()
            return route(logits, config, self.moe_lora_module_config[adapter_name].top_k, tau)


class Linear(MoeLoraLayer):
    """y = W0 x + the deltas of the active adapters. Wraps torch.nn.Linear and transformers' Conv1D."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoeLoraConfig, module: ModuleConfig) -> None:
        super().__init__(base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, module)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        self.moe_lora_routing = {}
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if adapter_names is not None:
            return self._add_mixed_batch(result, x, adapter_names)
        for name in self.active_adapters:
            if name in self.moe_lora_A:
                result = result + self._delta(name, x).to(result.dtype)
        return result

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

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: see `MERGE_REFUSAL`."""
        raise ValueError(MERGE_REFUSAL)

    def unmerge(self) -> None:
        """Refused: nothing is ever merged."""
        raise ValueError(MERGE_REFUSAL)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: without the last forward's routing, whose tensors belong to an autograd graph."""
        return {**self.__dict__, "moe_lora_routing": {}}

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()


def _scaled(gates: Tensor, scalings: tuple[float, ...]) -> Tensor:
    """g_e s_e; a plain number when all s_e are equal, which spares a copy to the device in every forward."""
    return gates * (scalings[0] if len(set(scalings)) == 1 else gates.new_tensor(scalings))


def _linear(linear: Any, x: Tensor) -> Tensor:
    """An nn.Linear (ModuleDict forgets the type) in the dtype of x, whatever dtype its parameters are stored in."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)
