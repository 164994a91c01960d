"""Every load of PEFT is checked against the model before any tensor is copied."""

import re
from collections.abc import Callable

from torch import Tensor, nn, promote_types

from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.peft_tuner.shared_router import CHILD


def check_file(
    stored: dict[str, Tensor], file_name: Callable[[str], str], model: nn.Module, adapter_name: str
) -> dict[str, Tensor]:
    """The tensors of the adapter among those about to be loaded.

    Args:
        stored: {name in the model, with or without PEFT's "base_model.model.": tensor}.
        file_name: from the name in a PeftModel to the name in the file.

    Raises:
        CheckpointError: with every missing, unexpected and wrongly shaped tensor.
    """
    # PEFT removes "base_model.model." later when the model itself is not a PeftModel
    everything = {k.removeprefix(PREFIX): v for k, v in model.state_dict().items()}
    expected = {k: v for k, v in everything.items() if is_own(k, adapter_name)}
    found = {k.removeprefix(PREFIX): v for k, v in stored.items()}
    problems = [
        f"{file_name(PREFIX + k)}: missing, expected shape {list(v.shape)}"
        for k, v in expected.items()
        if k not in found
    ]
    for key, tensor in found.items():
        if key not in everything:
            name = key if key.startswith("base_model.") else PREFIX + key
            problems.append(f"{name}: unexpected tensor of shape {list(tensor.shape)}")
        elif key in expected and tensor.shape != expected[key].shape:
            wanted = list(expected[key].shape)
            problems.append(f"{file_name(PREFIX + key)}: shape {list(tensor.shape)}, expected {wanted}")
        elif key in expected and not (tensor.is_floating_point() and tensor.itemsize > 1):
            problems.append(f"{file_name(PREFIX + key)}: {tensor.dtype}, expected float32, bfloat16 or float16")
    if problems:
        raise CheckpointError(f"the file does not fit the config and the model (adapter {adapter_name!r})", problems)
    return {k: v for k, v in found.items() if k in expected}


def widen_to_hold(stored: dict[str, Tensor], model: nn.Module) -> None:
    """Gives each parameter a dtype that holds the stored values exactly, so that loading never rounds: an fp32 adapter
    stays fp32 on a bf16 base, also with autocast_adapter_dtype=False."""
    for name, parameter in model.named_parameters():
        tensor = stored.get(name.removeprefix(PREFIX))
        if tensor is not None:
            parameter.data = parameter.data.to(promote_types(parameter.dtype, tensor.dtype))


OWN = r"moe_lora_(?:A|B|router|threshold|temperature_[01]|task_embedding)"
PREFIX = "base_model.model."


def is_own(key: str, adapter_name: str) -> bool:
    """Whether a key of the model's state dict is a tensor of this adapter (modules_to_save apart)."""
    return re.search(rf"(^|\.){OWN}\.{re.escape(adapter_name)}(\.|$)", key) is not None


def of_shared_router(key: str, adapter_name: str) -> str | None:
    """The file's name of a tensor of a router that serves several layers; None for any other tensor.

    base_model.model.{block}.mixture_router.moe_lora_router.{adapter}.weight    in the model
    base_model.model.{block}.moe_lora_router.weight                             in the file
    base_model.model.mixture_router.moe_lora_router.{adapter}.{j}.weight        in the model
    base_model.moe_lora_router_{j}.weight                                       in the file
    """
    owner, found, name = key.partition(f"{CHILD}.")
    match = re.fullmatch(rf"({OWN})\.{re.escape(adapter_name)}(?:\.(\d+))?\.(weight|bias)", name)
    if not found or match is None:
        return None
    role, layer, kind = match.groups()
    owner = "base_model." if owner == PREFIX else owner
    return f"{owner}{role}{'' if layer is None else f'_{layer}'}.{kind}"
