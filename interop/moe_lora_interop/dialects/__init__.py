"""Every known checkpoint layout, one table per file."""

from moe_lora_interop.dialects.adamole import ADAMOLE, GOAT, MOLE
from moe_lora_interop.dialects.arrow import ARROW
from moe_lora_interop.dialects.coin import COIN
from moe_lora_interop.dialects.comol import COMOL
from moe_lora_interop.dialects.ewora import EWORA
from moe_lora_interop.dialects.for_ai import FOR_AI_MOLORA
from moe_lora_interop.dialects.hydralora import HYDRALORA
from moe_lora_interop.dialects.ld_mole import LD_MOLE
from moe_lora_interop.dialects.lora import PLAIN_LORA
from moe_lora_interop.dialects.loramoe import LORAMOE
from moe_lora_interop.dialects.maxtext import MAXTEXT
from moe_lora_interop.dialects.meteora import METEORA
from moe_lora_interop.dialects.moe_peft import DYNMOLE, MIXLORA, MIXLORA_LEGACY, MOE_PEFT_LORAMOE, MOE_PEFT_MOLA
from moe_lora_interop.dialects.moelora import MOELORA
from moe_lora_interop.dialects.mola import MOLA
from moe_lora_interop.dialects.mtl_lora import MTL_LORA, MTL_MOELORA
from moe_lora_interop.dialects.native import NATIVE
from moe_lora_interop.dialects.peft_router import PEFT_ROUTER
from moe_lora_interop.dialects.poly import POLY
from moe_lora_interop.dialects.xlora import XLORA
from moe_lora_interop.dialects.xlora_original import XLORA_ORIGINAL

FILE_DIALECTS = (
    NATIVE,
    PLAIN_LORA,
    LORAMOE,
    LD_MOLE,
    HYDRALORA,
    MOE_PEFT_LORAMOE,
    MOE_PEFT_MOLA,
    MIXLORA,
    MIXLORA_LEGACY,
    DYNMOLE,
    MOLA,
    MOLE,
    ADAMOLE,
    GOAT,
    FOR_AI_MOLORA,
    ARROW,
    POLY,
    MOELORA,
    COIN,
    METEORA,
    COMOL,
    MTL_LORA,
    MTL_MOELORA,
    XLORA,
    XLORA_ORIGINAL,
    PEFT_ROUTER,
    EWORA,
)

__all__ = ["FILE_DIALECTS", "MAXTEXT", "NATIVE"]
