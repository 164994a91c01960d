"""The tuner: finds the target layers, wraps them, and carries PEFT's verbs."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from torch import Tensor, nn

from interop.errors import CheckpointError, ConfigError
from interop.peft_tuner.config import MoeLoraConfig
from interop.peft_tuner.layer import BASE_ADAPTER, MERGE_REFUSAL, Linear, MoeLoraLayer, unsupported
from interop.peft_tuner.losses import moe_lora_aux_loss

WEIGHTED_REFUSAL = (
    "MOE_LORA adapters cannot be combined with add_weighted_adapter: no router weighs like a weighted sum of routers. "
    "Activate both (model.base_model.set_adapter([a, b]) adds their deltas), or make one mixture of ordinary LoRA "
    "adapters: moe-lora combine LORA_DIR LORA_DIR ... DST"
)

# what this tuner computes, of the vocabulary of interop.config
SUPPORTED = {"scope": "linear", "router_input": "hidden", "mix": "outputs"}


class MoeLoraModel(BaseTuner):
    """PEFT's tuner for peft_type MOE_LORA. Users meet it as `peft_model.base_model`."""

    prefix = "moe_lora_"
    tuner_layer_cls = MoeLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def moe_lora_aux_loss(self, attention_mask: Tensor | None = None) -> Tensor:
        """See `interop.peft_tuner.losses.moe_lora_aux_loss`. Also reachable as `peft_model.moe_lora_aux_loss()`."""
        return moe_lora_aux_loss(self.model, attention_mask)

    # --- injection ---------------------------------------------------------------------------------------------------

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
            ConfigError: target_modules that match nothing (with the nearest names), patterns that do not fit, or a
                routing scheme that this tuner does not compute.
            ValueError: an adapter name that PEFT would confuse with a part of the model.
        """
        config = cast(MoeLoraConfig, self.peft_config[adapter_name])
        _check_adapter_name(model, adapter_name)
        _check_supported(config)
        if state_dict is None:  # otherwise its keys say what to wrap
            self._check_targets(config, model)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        _warn_of_unused_patterns(config, model, adapter_name)

    def _check_targets(self, config: MoeLoraConfig, model: nn.Module) -> None:
        linears = _linear_paths(model)
        if config.target_modules is None:  # PEFT's defaults name layers that not every variant of a model has
            self._prepare_adapter_config(config, self.get_model_config(model))  # fills target_modules in
            chosen = [m for m in linears if self._check_target_module_exists(config, m)]
        else:
            chosen = config.neutral.targets.select(linears)
        neutral = config.neutral
        problems: list[str] = []
        for module in chosen:
            try:
                neutral.for_module(module)
            except ConfigError as error:
                problems.extend(error.problems)
        if problems:
            raise ConfigError("the patterns do not fit together", problems)

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
        if isinstance(target, MoeLoraLayer):
            target.update_layer(adapter_name, config, module)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if (reason := unsupported(base)) is not None:
            raise TypeError(f"target module {current_key!r} is not supported: {reason}")
        new = Linear(target, adapter_name, config, module)
        if adapter_name not in self.active_adapters:  # an additional adapter is not trained until it is activated
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    # --- loading -----------------------------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every load of PEFT passes here: checks the file against the model before any tensor is copied.

        Raises:
            CheckpointError: with every missing, unexpected and wrongly shaped tensor.
        """
        stored = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = re.compile(rf"\.({'|'.join(cls.tuner_layer_cls.adapter_layer_names)})\.{re.escape(adapter_name)}(\.|$)")
        # PEFT removes "base_model.model." later when the model itself is not a PeftModel
        prefix = "base_model.model."
        everything = {k.removeprefix(prefix): v for k, v in model.state_dict().items()}
        expected = {k: v for k, v in everything.items() if own.search(k)}
        found = {k.removeprefix(prefix): v for k, v in stored.items()}
        label = partial(_file_key, cls, prefix, adapter_name)
        problems = [
            f"{label(k)}: missing, expected shape {list(v.shape)}" for k, v in expected.items() if k not in found
        ]
        for key, tensor in found.items():
            if key not in everything:
                problems.append(f"{label(key)}: unexpected tensor of shape {list(tensor.shape)}")
            elif key in expected and tensor.shape != expected[key].shape:
                problems.append(f"{label(key)}: shape {list(tensor.shape)}, expected {list(expected[key].shape)}")
        if problems:
            raise CheckpointError(
                f"the file does not fit the config and the model (adapter {adapter_name!r})", problems
            )
        _widen_to_hold({k: v for k, v in found.items() if k in expected}, model, prefix)
        return stored

    # --- mixed batches -----------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands the argument `adapter_names` of forward and generate to every layer (PEFT's LoRA does it this way)."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        beams = kwargs.get("num_beams") or 1
        get_encoder = getattr(self.model, "get_encoder", None)  # transformers: the model itself if it has no encoder
        encoder = get_encoder() if get_encoder is not None else None
        in_encoder = set() if encoder is None or encoder is self.model else set(encoder.modules())
        repeated = [name for name in adapter_names for _ in range(beams)]  # beam search repeats the decoder's inputs
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_adapter_names, list(adapter_names) if module in in_encoder else repeated),
                with_kwargs=True,
            )
            for module in self.modules()
            if isinstance(module, MoeLoraLayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: list[str]) -> None:
        """In PEFT's words, which users know from LoRA."""
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {n for layer in self.modules() if isinstance(layer, MoeLoraLayer) for n in layer.moe_lora_A}
        unknown = sorted(set(adapter_names) - known - {BASE_ADAPTER})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)} "
                f"(this model has {', '.join(sorted(known))})"
            )

    # --- refused -----------------------------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> NoReturn:
        """merge_and_unload and merge_adapter ask here first."""
        raise ValueError(MERGE_REFUSAL)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: see `WEIGHTED_REFUSAL`."""
        raise ValueError(WEIGHTED_REFUSAL)


def _pass_adapter_names(names: list[str], _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict]:
    return args, {**kwargs, "adapter_names": names}


def _linear_paths(model: nn.Module) -> list[str]:
    """Paths of the layers that an adapter can wrap or has wrapped, without the insides of tuner layers."""
    paths: list[str] = []
    skipped = ""  # named_modules goes depth first, so what lies inside a layer follows it directly
    for path, module in model.named_modules():
        if skipped and path.startswith(skipped):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            skipped = f"{path}."
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if unsupported(base) is None:
            paths.append(path)
    return paths


def _check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """PEFT separates adapters in a state dict by looking for their names between the dots of its keys."""
    if adapter_name.isdigit():
        raise ValueError(
            f"adapter name {adapter_name!r} is a number, like the model's layers: PEFT would drop layer {adapter_name} "
            f"from the files of other adapters. Choose another name, for example adapter_{adapter_name}"
        )
    taken = {"base_model", "model", "base_layer", "weight", "bias", *MoeLoraLayer.adapter_layer_names}
    for path in _linear_paths(model):
        taken.update(path.split("."))
    if adapter_name in taken:
        raise ValueError(
            f"adapter name {adapter_name!r} is also a part of this model's parameter names: PEFT would drop those "
            f"parameters from the files of other adapters. Choose another name, for example adapter_{adapter_name}"
        )


def _check_supported(config: MoeLoraConfig) -> None:
    problems = [
        f"{field}: found {getattr(config, field)!r}, the PEFT tuner computes only {supported!r}"
        for field, supported in SUPPORTED.items()
        if getattr(config, field) != supported
    ]
    if problems:
        raise ConfigError("this mixture cannot be used in PEFT yet", problems)


def _warn_of_unused_patterns(config: MoeLoraConfig, model: nn.Module, adapter_name: str) -> None:
    """PEFT does this for rank_pattern and alpha_pattern."""
    modules = [p for p, m in model.named_modules() if isinstance(m, MoeLoraLayer) and adapter_name in m.moe_lora_A]
    for field in ("num_experts_pattern", "top_k_pattern"):
        unused = [k for k in getattr(config, field) if not any(re.match(rf"(.*\.)?({k})$", m) for m in modules)]
        if unused:
            warnings.warn(
                f"The following {field} keys did not match any targeted module and were ignored: {sorted(unused)}.",
                RuntimeWarning,
                stacklevel=2,
            )


def _file_key(cls: type[MoeLoraModel], prefix: str, adapter_name: str, key: str) -> str:
    """The name that a tensor of the model has in the file."""
    return prefix + cls._remove_adapter_name_from_key(key, adapter_name)


def _widen_to_hold(stored: dict[str, Tensor], model: nn.Module, prefix: str) -> None:
    """Gives each parameter a dtype that holds the stored values exactly, so that loading never rounds: an fp32 adapter
    stays fp32 on a bf16 base, also with autocast_adapter_dtype=False."""
    for name, parameter in model.named_parameters():
        tensor = stored.get(name.removeprefix(prefix))
        if tensor is not None:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, tensor.dtype))
