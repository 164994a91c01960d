"""A PEFT method of its own: importing this module registers the peft_type MOE_LORA.

    import moe_lora_interop.peft_tuner
    model = peft.PeftModel.from_pretrained(base, "path/to/adapter")

PEFT has no plug-in discovery, so this import comes before the first use. Nothing here imports jax.
"""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from moe_lora_interop.config.adapter_config import PEFT_TYPE


def _extend_peft_type() -> None:
    """Adds the member MOE_LORA to PEFT's enum, which register_peft_method requires and which is closed.

    A member made the way `enum` makes its own: later lookups by name and by value, copies, pickles and `.value` work.
    """
    if PEFT_TYPE in PeftType.__members__:
        return
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = member._value_ = PEFT_TYPE
    type.__setattr__(PeftType, PEFT_TYPE, member)
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member


_extend_peft_type()  # before the config is imported: it names the member

from moe_lora_interop.peft_tuner.config import MoeLoraConfig  # noqa: E402
from moe_lora_interop.peft_tuner.gating import RouterOutput  # noqa: E402
from moe_lora_interop.peft_tuner.layer import Linear  # noqa: E402
from moe_lora_interop.peft_tuner.losses import moe_lora_aux_loss  # noqa: E402
from moe_lora_interop.peft_tuner.model import MoeLoraModel  # noqa: E402
from moe_lora_interop.peft_tuner.model_router import task_routing  # noqa: E402
from moe_lora_interop.peft_tuner.router import MoeLoraLayer  # noqa: E402

if PeftType(PEFT_TYPE) not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(
        name=PEFT_TYPE.lower(), config_cls=MoeLoraConfig, model_cls=MoeLoraModel, prefix=MoeLoraModel.prefix
    )

__all__ = [
    "Linear",
    "MoeLoraConfig",
    "MoeLoraLayer",
    "MoeLoraModel",
    "RouterOutput",
    "moe_lora_aux_loss",
    "task_routing",
]
