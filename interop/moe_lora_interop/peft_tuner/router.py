"""The routers of adapters at one place: beside a linear layer, at a feed-forward block, or at the model."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig
from moe_lora_interop.config.routing_rule import function_of
from moe_lora_interop.peft_tuner.gating import RouterOutput, route
from moe_lora_interop.peft_tuner.offload import take_back
from moe_lora_interop.peft_tuner.refusals import MERGE_REFUSAL, NO_VALUE
from moe_lora_interop.peft_tuner.shared import Shared
from moe_lora_interop.peft_tuner.unclaimed import Claim, Watch

ROUTER_STD = 0.02


class MoeLoraLayer(nn.Module, BaseTunerLayer):
    """What every tuner layer holds, keyed by adapter name; every attribute starts with the prefix `moe_lora_`.

    moe_lora_router          Linear(in, logit); scope model: a list of them, an MLP with ReLU between
    moe_lora_threshold       Linear(in, 1)               only with adaptive_threshold
    moe_lora_temperature_0   Linear(in, width)           only with temperature_hidden_size, which is this width
    moe_lora_temperature_1   Linear(width, 1)            beside it
    moe_lora_task_embedding  Embedding(task, dim)        only with router_input task; dim = logit without a router
    moe_lora_shared          Shared                      where the gates, slots or task ids travel
    moe_lora_routing         RouterOutput                of the last forward in training mode, for losses and plots
    moe_lora_watch           Watch                       only with auxiliary losses: whether somebody adds them
    moe_lora_claim           Claim                       on the losses of `moe_lora_routing`

    `logit` counts num_experts x n_splits, times the routed layers for a layerwise router.
    """

    adapter_layer_names: tuple[str, ...] = (
        "moe_lora_router",
        "moe_lora_threshold",
        "moe_lora_temperature_0",
        "moe_lora_temperature_1",
        "moe_lora_task_embedding",
    )
    other_param_names: tuple[str, ...] = (
        "moe_lora_config",
        "moe_lora_module_config",
        "moe_lora_shared",
        "moe_lora_routing",
        "moe_lora_watch",
        "moe_lora_claim",
    )

    path = ""
    """This layer's place in the model, for messages."""

    def __init__(self) -> None:
        super().__init__()
        self.moe_lora_router = nn.ModuleDict()
        self.moe_lora_threshold = nn.ModuleDict()
        self.moe_lora_temperature_0 = nn.ModuleDict()
        self.moe_lora_temperature_1 = nn.ModuleDict()
        self.moe_lora_task_embedding = nn.ModuleDict()
        self.moe_lora_config: dict[str, MoeLoraConfig] = {}
        self.moe_lora_module_config: dict[str, ModuleConfig] = {}
        self.moe_lora_shared: dict[str, Shared] = {}
        self.moe_lora_routing: dict[str, RouterOutput] = {}
        self.moe_lora_watch: dict[str, Watch] = {}
        self.moe_lora_claim: dict[str, Claim] = {}

    def add_router(
        self,
        adapter_name: str,
        in_features: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        layers: int = 1,
    ) -> None:
        """Creates the router that the adapter's config describes: weights and tables N(0, 0.02^2), biases 0, as in JAX;
        a learned threshold starts at zero, so tau = threshold / 2 for every token.

        Args:
            in_features: width of the router's input.
            layers: routed layers that get logits of their own (a layerwise router).

        Raises:
            ConfigError: a registered routing without a function for PyTorch.
        """
        config, module = self.moe_lora_config[adapter_name], self.moe_lora_module_config[adapter_name]
        if config.routing_rule is not None:
            function_of(config.routing_rule, "torch")
        logits = module.num_experts * config.n_splits * layers
        kwargs: Any = {"dtype": dtype, "device": device}
        if config.router_input == "task":
            dim = config.task_embedding_dim or logits
            self.moe_lora_task_embedding[adapter_name] = RouterTable(cast(int, config.num_tasks), dim, **kwargs)
        sizes = [
            config.task_embedding_dim or in_features,
            *[config.router_hidden_size or 0] * (config.router_depth - 1),
        ]
        linears = [
            RouterLinear(size, units, bias=config.router_bias, **kwargs)
            for size, units in zip(sizes[: config.router_depth], [*sizes[1:], logits], strict=False)
        ]
        if config.scope == "model" and linears:
            self.moe_lora_router[adapter_name] = nn.ModuleList(linears)
        elif linears:
            self.moe_lora_router[adapter_name] = linears[0]
        if config.adaptive_threshold:
            self.moe_lora_threshold[adapter_name] = RouterLinear(in_features, 1, **kwargs)
        if width := config.temperature_hidden_size:
            self.moe_lora_temperature_0[adapter_name] = RouterLinear(in_features, width, **kwargs)
            self.moe_lora_temperature_1[adapter_name] = RouterLinear(width, 1, **kwargs)
        for name in MoeLoraLayer.adapter_layer_names:
            for key, parameter in self.entry(name, adapter_name).named_parameters():
                std = 0.0 if key.endswith("bias") or name == "moe_lora_threshold" else ROUTER_STD
                nn.init.normal_(parameter, std=std)

    def entry(self, container: str, adapter_name: str) -> nn.Module:
        """The adapter's module in the container of this name, or an empty one."""
        modules: nn.ModuleDict = getattr(self, container)
        return modules[adapter_name] if adapter_name in modules else nn.Identity()

    def router_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """The parameters of the adapter's router that stands here; none if none does."""
        return [p for name in MoeLoraLayer.adapter_layer_names for p in self.entry(name, adapter_name).parameters()]

    def take_back(self) -> None:
        """`offload.take_back` of all adapters' parameters here."""
        for name in self.adapter_layer_names:
            take_back(getattr(self, name))

    def require_values(self, adapter_name: str) -> None:
        """Called when a parameter of the adapter has no value: takes it back if accelerate has offloaded it.

        Raises:
            RuntimeError: nobody has its value.
        """
        self.take_back()
        missing = [
            f"{self.path}.{name}".removeprefix(".")
            for name in self.adapter_layer_names
            if adapter_name in (entries := getattr(self, name))
            for key, parameter in entries.named_parameters()
            if key.split(".")[0] == adapter_name and parameter.is_meta
        ]
        if missing:
            raise RuntimeError(NO_VALUE.format(parameter=missing[0], name=adapter_name))

    def route(self, adapter_name: str, x: Tensor) -> RouterOutput:
        """The decision for every token of x [token, in]: z = (R x + b) / T, and gates."""
        noise = self.moe_lora_config[adapter_name].router_jitter_noise
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.training and noise:
                x = x * torch.empty_like(x).uniform_(1 - noise, 1 + noise)
            return self._decide(adapter_name, x)

    def route_tasks(self, adapter_name: str, task_ids: Tensor) -> RouterOutput:
        """The decision for every sequence: x = T[id] for ids [batch]; for [batch, n] the mean of T[id] over the ids > 0
        (MOELoRA's rule). z = (R x + b) / router_temperature, or z = x / router_temperature without a router."""
        table = self.moe_lora_task_embedding[adapter_name]
        if _lacks_value(table):
            self.require_values(adapter_name)
        with torch.autocast(task_ids.device.type, enabled=False):
            rows = table(task_ids)
            if task_ids.ndim == 2:
                given = (task_ids > 0).to(rows)
                rows = (rows * given[..., None]).sum(1) / given.sum(1, keepdim=True).clamp(min=1)
            return self._decide(adapter_name, rows)

    def _decide(self, adapter_name: str, x: Tensor) -> RouterOutput:
        """Routes x [row, in] in its dtype, whatever that of the adapter: fields [row, (split or layer,) expert]."""
        config, module = self.moe_lora_config[adapter_name], self.moe_lora_module_config[adapter_name]
        router = self.entry("moe_lora_router", adapter_name)
        linears = list(router) if isinstance(router, nn.ModuleList) else [router]
        if any(map(_lacks_value, linears)):
            self.require_values(adapter_name)
        tau: Tensor | float | None = config.threshold
        if config.adaptive_threshold and tau is not None:
            tau = tau * self.moe_lora_threshold[adapter_name](x).sigmoid()
        temperature = self._temperature(adapter_name, x)
        for j, linear in enumerate(linears):
            if j:
                x = F.dropout(F.relu(x), config.router_dropout, self.training)
            x = linear(x)
        logits = x if isinstance(temperature, float) and temperature == 1 else x / temperature
        if config.n_splits > 1 or config.layerwise:
            logits = logits.unflatten(-1, (-1, module.num_experts))
        routing = route(logits, config, module.top_k, tau)
        if self.training:
            self.moe_lora_routing[adapter_name] = routing
        return routing

    def _temperature(self, adapter_name: str, x: Tensor) -> Tensor | float:
        """T: one number, or with temperature_hidden_size [row, 1], which is never less."""
        config = self.moe_lora_config[adapter_name]
        least = float(config.router_temperature)
        if config.temperature_hidden_size is None:
            return least
        hidden = F.relu(self.moe_lora_temperature_0[adapter_name](x))
        return least + F.softplus(-self.moe_lora_temperature_1[adapter_name](hidden))

    def weights(self, adapter_name: str, gates: Tensor) -> Tensor:
        """routed_scaling_factor g, with expert_dropout in training."""
        config, watch = self.moe_lora_config[adapter_name], self.moe_lora_watch.get(adapter_name)
        # a hook in a compiled graph would need torch's compiled autograd
        if watch is not None and self.training and gates.requires_grad and not torch.compiler.is_compiling():
            gates, self.moe_lora_claim[adapter_name] = watch.over(gates)
        gates = F.dropout(gates, config.expert_dropout, self.training)
        return gates if config.routed_scaling_factor == 1 else gates * config.routed_scaling_factor

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: see `MERGE_REFUSAL`."""
        raise ValueError(MERGE_REFUSAL)

    def unmerge(self) -> None:
        """Refused: nothing is ever merged."""
        raise ValueError(MERGE_REFUSAL)

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: without the last forward's routing, whose tensors belong to an autograd graph."""
        return {**self.__dict__, "moe_lora_routing": {}, "moe_lora_claim": {}}


class RouterLinear(nn.Linear):
    """W x + b in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RouterTable(nn.Embedding):
    """Rows of the table in at least fp32: ids [...] -> [..., dim]."""

    def forward(self, ids: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.embedding(ids.to(self.weight.device), self.weight).to(dtype)


def _lacks_value(module: nn.Module) -> bool:
    """Whether the weight is on the meta device. Asked before the call, in which accelerate would lend it a value."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.is_meta
