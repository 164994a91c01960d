"""The tuner: finds the target layers, wraps them, and carries PEFT's verbs."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.integrations import init_empty_weights
from torch import Tensor, nn

from moe_lora_interop.config.adapter_config import PATTERNS
from moe_lora_interop.config.modules import block_of
from moe_lora_interop.config.patterns import match_start
from moe_lora_interop.config.stuck_routers import warn_of_stuck_routers
from moe_lora_interop.errors import ConfigError
from moe_lora_interop.peft_tuner.checks import (
    check_adapter_name,
    check_fit,
    check_own_routers,
    untouched_experts,
    warn_of_untouched_experts,
)
from moe_lora_interop.peft_tuner.config import MoeLoraConfig
from moe_lora_interop.peft_tuner.layer import Linear, unsupported
from moe_lora_interop.peft_tuner.loading import check_file, of_shared_router, widen_to_hold
from moe_lora_interop.peft_tuner.losses import moe_lora_aux_loss
from moe_lora_interop.peft_tuner.mixed_batches import check_adapter_names, mixed_batch
from moe_lora_interop.peft_tuner.model_router import task_routing
from moe_lora_interop.peft_tuner.offload import give, is_between_dispatches
from moe_lora_interop.peft_tuner.refusals import INJECTION_REFUSAL, MERGE_REFUSAL, WEIGHTED_REFUSAL
from moe_lora_interop.peft_tuner.router import MoeLoraLayer
from moe_lora_interop.peft_tuner.unclaimed import UNCLAIMED, Watch
from moe_lora_interop.peft_tuner.wiring import unwire, wire


class MoeLoraModel(BaseTuner):
    """PEFT's tuner for peft_type MOE_LORA. Users meet it as `peft_model.base_model`."""

    prefix = "moe_lora_"
    # PEFT asks the class whether adapters can be injected without it, which those of scope linear can; of an instance
    # this says whether a router serves several layers
    uses_shared_state = False
    tuner_layer_cls = MoeLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def moe_lora_aux_loss(
        self,
        attention_mask: Tensor | None = None,
        task_types: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """See `losses.moe_lora_aux_loss`. Also reachable as `peft_model.moe_lora_aux_loss()`."""
        return moe_lora_aux_loss(self.model, attention_mask, task_types, decoder_attention_mask)

    def task_routing(self, task_ids: Any) -> AbstractContextManager[None]:
        """See `model_router.task_routing`: `with peft_model.base_model.task_routing(ids): ...`."""
        return task_routing(self.model, task_ids)

    # --- injection ---------------------------------------------------------------------------------------------------

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self.__dict__["aside"] = []
        injected = peft_config if isinstance(peft_config, PeftConfig) else None  # a PeftModel hands over a dict
        if isinstance(injected, MoeLoraConfig) and injected.scope != "linear" and hasattr(model, "load_adapter"):
            raise ConfigError("cannot be injected", [f"scope: {INJECTION_REFUSAL.format(scope=injected.scope)}"])
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """PEFT's, after all checks that can fail: nothing is wrapped when the name or the config is refused.

        Raises:
            ConfigError: target_modules that match nothing (with the nearest names), or a config that does not fit the
                model.
            ValueError: an adapter name that PEFT would confuse with a part of the model.
        """
        config = cast(MoeLoraConfig, self.peft_config[adapter_name])
        linears = _linear_layers(model)
        check_adapter_name(adapter_name, _names_without_adapters(model))
        chosen = self._chosen(config, model, list(linears), state_dict)
        check_fit(model, config.neutral, linears, chosen)
        if config.layerwise and config.module_order is None:
            config.module_order = config.neutral.routed(chosen) or None
        warns = config.neutral.targets.is_all_linear
        if warns:  # PEFT's own list has layers that no adapter can wrap, such as those of nn.MultiheadAttention
            config.target_modules = set(chosen)
        targets = config.target_modules
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        if isinstance(targets, set):
            config.target_modules = targets  # PEFT shortens long lists
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            for layer in wire(model, adapter_name, config.neutral):
                layer._active_adapter = self.active_adapters
                trains = adapter_name in self.active_adapters and not config.inference_mode
                for parameter in layer.router_parameters(adapter_name):
                    parameter.requires_grad_(trains)
        self.uses_shared_state = self.uses_shared_state or config.scope != "linear"
        if config.router_aux_loss_coef or config.router_z_loss_coef:
            coefficients = {"balance": config.router_aux_loss_coef, "z": config.router_z_loss_coef}
            watch = Watch(UNCLAIMED.format(name=adapter_name, **coefficients))
            for layer in _tuner_layers(model):
                layer.moe_lora_watch[adapter_name] = watch
        _warn_of_unused_patterns(config, model, adapter_name)
        resolved = config.neutral.resolved(chosen)
        for pattern in PATTERNS:  # said so that their order, which PEFT sorts when it saves, does not matter
            setattr(config, pattern, getattr(resolved, pattern))
        if not config.inference_mode:
            warn_of_stuck_routers(resolved, chosen)
        if warns:
            warn_of_untouched_experts(model)

    def _chosen(
        self, config: MoeLoraConfig, model: nn.Module, linears: list[str], state_dict: dict[str, Tensor] | None
    ) -> list[str]:
        """The paths to wrap, in the model's order."""
        if state_dict is not None:  # its keys say what to wrap
            modules = {key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict}
            return [m for m in linears if m in modules]
        fused = list(untouched_experts(model))
        if config.target_modules is None:  # PEFT's defaults name layers that not every variant of a model has
            self._prepare_adapter_config(config, self.get_model_config(model))  # fills target_modules in
            return [m for m in linears if self._check_target_module_exists(config, m)]
        heads = set(linears) - _all_linear(config, model) if config.neutral.targets.is_all_linear else set()
        chosen = set(config.neutral.targets.select(linears, heads, fused))
        return [m for m in linears if m in chosen]

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = peft_config.neutral
        module = config.for_module(current_key)
        if isinstance(target, Linear):
            target.update_layer(adapter_name, config, module)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if (reason := unsupported(base)) is not None:
            leave_out = f"To leave it out: exclude_modules=[{current_key!r}]"
            raise TypeError(f"target module {current_key!r} is not supported: {reason}. {leave_out}")
        new = Linear(target)
        new.path = current_key
        new._active_adapter = adapter_name
        new.update_layer(adapter_name, config, module)
        if adapter_name not in self.active_adapters:  # an additional adapter is not trained until it is activated
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's moves a new layer to where the base layer's weight is, which is nowhere if it is offloaded; ours is
        already where that one computes."""
        if isinstance(new_module, Linear):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's, which is the last thing that load_adapter does."""
        for layer, name, entries in self.aside:
            setattr(layer, name, entries)
            layer._move_adapter_to_device_of_base_layer(adapter_name)
        self.aside.clear()
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        super()._unload_and_optionally_merge(*args, **kwargs)
        unwire(self.model)
        return self.model

    # --- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        shared = of_shared_router(key, adapter_name)
        return shared or super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Every save of PEFT passes here.

        Raises:
            CheckpointError: a router is not ours, so that the config would not describe the function.
            RuntimeError: a parameter has no value.
        """
        check_own_routers(model, adapter_name)
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if any(tensor.is_meta for tensor in found.values()):
            for layer in _tuner_layers(model):
                layer.require_values(adapter_name)
            own = dict(model.named_parameters())
            found = {key: own[key].detach() if tensor.is_meta else tensor for key, tensor in found.items()}
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every load of PEFT passes here; raises CheckpointError as in `loading`."""
        for layer in _tuner_layers(model):
            layer.take_back()
        stored = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        file_name = partial(cls._remove_adapter_name_from_key, adapter_name=adapter_name)
        own = check_file(stored, file_name, model, adapter_name)
        widen_to_hold(own, model)
        tuner = getattr(model, "base_model", None)
        if isinstance(tuner, cls) and is_between_dispatches(model):
            tuner._step_aside(own)
        return stored

    def _step_aside(self, own: dict[str, Tensor]) -> None:
        """Hides the adapter, with these values, from accelerate until `_cast_adapter_dtype`: the hooks that PEFT makes
        for disk know only the values of parameters whose names in the file end in ".weight"."""
        for name, parameter in self.model.named_parameters():
            if name in own:
                give(parameter, own[name])
        for layer in _tuner_layers(self.model):
            for name in layer.adapter_layer_names:
                entries = getattr(layer, name)
                self.aside.append((layer, name, entries))
                setattr(layer, name, type(entries)())

    # --- mixed batches -----------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around forward and generate."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        check_adapter_names(self, adapter_names)
        with mixed_batch(self, self.model, adapter_names, beams=kwargs.get("num_beams") or 1):
            yield

    # --- refused -----------------------------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> NoReturn:
        """merge_and_unload and merge_adapter ask here first."""
        raise ValueError(MERGE_REFUSAL)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: see `WEIGHTED_REFUSAL`."""
        raise ValueError(WEIGHTED_REFUSAL)


def _tuner_layers(model: nn.Module) -> list[MoeLoraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, MoeLoraLayer)]


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{path: base layer} of those that an adapter can wrap or has wrapped, without the insides of tuner layers."""
    layers: dict[str, nn.Module] = {}
    skipped = ""  # named_modules goes depth first, so what lies inside a layer follows it directly
    for path, module in model.named_modules():
        if skipped and path.startswith(skipped):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            skipped = f"{path}."
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if unsupported(base) is None:
            layers[path] = base
    return layers


def _names_without_adapters(model: nn.Module) -> list[str]:
    """The names of the model's modules and tensors, those inside adapters apart, which have adapters' names in them."""
    modules = dict(model.named_modules())
    adapters = (MoeLoraLayer, AuxiliaryTrainingWrapper)
    inside = tuple(f"{path}." for path, module in modules.items() if isinstance(module, adapters))
    tensors = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return [name for name in (*modules, *tensors) if not name.startswith(inside)]


def _all_linear(config: MoeLoraConfig, model: nn.Module) -> set[str]:
    """What PEFT takes "all-linear" for: all but the head, whichever layer that is."""
    with_list: Any = _maybe_include_all_linear_layers(copy.copy(config), model)
    return with_list.target_modules


def _warn_of_unused_patterns(config: MoeLoraConfig, model: nn.Module, adapter_name: str) -> None:
    """PEFT does this for rank_pattern and alpha_pattern. In scope ffn a key may name a block."""
    paths = {p for p, m in model.named_modules() if isinstance(m, Linear) and adapter_name in m.moe_lora_A}
    if config.scope == "ffn":
        paths |= {block_of(module) for module in paths}
    for field in ("num_experts_pattern", "top_k_pattern"):
        unused = [k for k in getattr(config, field) if not any(match_start(rf"(.*\.)?({k})$", p) for p in paths)]
        if unused:
            warnings.warn(
                f"The following {field} keys did not match any targeted module and were ignored: {sorted(unused)}.",
                RuntimeWarning,
                stacklevel=2,
            )
