"""Every known checkpoint layout, one table per file."""

from interop.dialects.adamole import ADAMOLE, GOAT, MOLE
from interop.dialects.arrow import ARROW
from interop.dialects.for_ai import FOR_AI_MOLORA
from interop.dialects.hydralora import HYDRALORA
from interop.dialects.jax_tree import JAX_TREE
from interop.dialects.lora import PLAIN_LORA
from interop.dialects.loramoe import LORAMOE
from interop.dialects.maxtext import MAXTEXT
from interop.dialects.moe_peft import MIXLORA, MIXLORA_LEGACY, MOE_PEFT_LORAMOE, MOE_PEFT_MOLA
from interop.dialects.moelora import MOELORA
from interop.dialects.mola import MOLA
from interop.dialects.native import NATIVE
from interop.dialects.peft_router import PEFT_ROUTER
from interop.dialects.poly import POLY
from interop.dialects.xlora import XLORA

FILE_DIALECTS = (
    NATIVE,
    PLAIN_LORA,
    LORAMOE,
    HYDRALORA,
    MOE_PEFT_LORAMOE,
    MOE_PEFT_MOLA,
    MIXLORA,
    MIXLORA_LEGACY,
    MOLA,
    MOLE,
    ADAMOLE,
    GOAT,
    FOR_AI_MOLORA,
    ARROW,
    POLY,
    MOELORA,
    XLORA,
    PEFT_ROUTER,
)

__all__ = ["FILE_DIALECTS", "JAX_TREE", "MAXTEXT", "NATIVE"]
