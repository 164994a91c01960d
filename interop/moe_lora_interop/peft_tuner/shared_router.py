"""Routers that serve several layers stand beside them, as a tuner layer of their own, and run in a hook."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig
from moe_lora_interop.peft_tuner.layer import Linear
from moe_lora_interop.peft_tuner.offload import execution_device
from moe_lora_interop.peft_tuner.refusals import BLOCK_REFUSAL
from moe_lora_interop.peft_tuner.router import MoeLoraLayer
from moe_lora_interop.peft_tuner.shared import Shared
from moe_lora_interop.peft_tuner.slots import Slots

CHILD = "mixture_router"
"""The attribute of the block or model that holds its router. Without PEFT's prefix: peft.functional.delete_adapter
skips modules whose path contains it. The names in files do not have this part (`loading`)."""


class SharedRouter(MoeLoraLayer):
    """A router at `owner`, a feed-forward block or the model. A tuner layer, so that PEFT's verbs find it; a child of
    its owner, so that it is saved, moved and sharded with it. The layers it serves read from its `moe_lora_shared`."""

    owner: Any

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        # not through nn.Module.__setattr__, which would make the owner a child of its child
        self.__dict__["owner"] = owner
        self.handles: list[RemovableHandle] = []
        owner.add_module(CHILD, self)

    def add_adapter(
        self, adapter_name: str, config: MoeLoraConfig, module: ModuleConfig, in_features: int, layers: int = 1
    ) -> Shared:
        """Creates the adapter's router (none in scope linear, where each layer has its own) and what it writes to."""
        self.moe_lora_config[adapter_name] = config
        self.moe_lora_module_config[adapter_name] = module
        self.moe_lora_shared[adapter_name] = Shared()
        if config.scope != "linear":
            like = next(self.owner.parameters())
            self.add_router(adapter_name, in_features, like.dtype, layers=layers)
            self._move_adapter_to_device_of_base_layer(adapter_name)
        return self.moe_lora_shared[adapter_name]

    def active_mixtures(self) -> list[str]:
        """The active adapters that have a router here."""
        return [] if self.disable_adapters else [n for n in self.active_adapters if n in self.moe_lora_shared]

    def detach(self) -> None:
        """Takes this router and its hooks off its owner."""
        for handle in self.handles:
            handle.remove()
        delattr(self.owner, CHILD)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if not any(p.is_meta for p in self.router_parameters(adapter_name)):
            for name in self.adapter_layer_names:
                self.entry(name, adapter_name).to(device or execution_device(self.owner))

    @property
    def weight(self) -> Tensor:
        """PEFT's is that of the base layer, which this one does not have."""
        raise AttributeError("weight")

    @property
    def bias(self) -> Tensor:
        """As `weight`."""
        raise AttributeError("bias")

    def __repr__(self) -> str:
        return "moe_lora." + super().__repr__()


class BlockRouter(SharedRouter):
    """The router of a feed-forward block: reads the block's input x, and leaves `Slots` to the block's layers."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner)
        self.handles.append(owner.register_forward_pre_hook(self.before_block, with_kwargs=True))
        self.handles.append(owner.register_forward_hook(self.after_block))

    def before_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Routes.

        Raises:
            ValueError: another adapter is active on the block's layers, too.
        """
        self.moe_lora_routing = {}
        names = self.active_mixtures()
        if not names:
            return
        name = names[0]
        others = {n for m in block.children() if isinstance(m, Linear) for n in m.active_adapters if n in m.moe_lora_A}
        if others - {name} or len(names) > 1:
            together = ", ".join(repr(n) for n in sorted(others | set(names)))
            raise ValueError(BLOCK_REFUSAL.format(names=together, name=repr(name)))
        x = args[0] if args else next(iter(kwargs.values()))
        gates = self.weights(name, self.route(name, x.reshape(-1, x.shape[-1])).gates)
        self.moe_lora_shared[name].value = Slots.of(gates, self.moe_lora_module_config[name].most_kept, x.shape[:-1])

    def after_block(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forgets the slots: a layer that is called outside its block must not use them."""
        for shared in self.moe_lora_shared.values():
            shared.value = None
