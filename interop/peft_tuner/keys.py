"""The names that tensors have in files: those of `interop.dialects.native`, derived from PEFT's in the model."""

import re

from interop.peft_tuner.shared_router import CHILD

OWN = r"moe_lora_(?:A|B|router|threshold|task_embedding)"
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
