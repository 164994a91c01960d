"""LD-MoLE: as many experts as a token needs, by a projection whose temperature an MLP of the layer's input learns."""

from moe_lora_interop.dialects.loramoe import LORAMOE
from moe_lora_interop.rules.codecs import renamed
from moe_lora_interop.rules.dialect import Dialect, Field
from moe_lora_interop.rules.tensors import Rule

_MLP = "mlp.proj_layers.{width}.{j*2}"
_OF_MODULE, _OF_MODEL = f"base_model.model.{{module}}.sparsegen.{_MLP}", f"base_model.sparsegen_fn.{_MLP}"

LD_MOLE = Dialect(
    name="ld-mole",
    source="eshentw/LD-MoLE@d7b7425, peft/utils/sparsegen.py",
    rules=(
        *LORAMOE.rules,
        Rule("temperature_{j}", f"{_OF_MODULE}.weight", "unit in"),
        Rule("temperature_bias_{j}", f"{_OF_MODULE}.bias", "unit"),
        Rule("temperature_{j}", f"{_OF_MODEL}.weight", "unit in", copy="same"),
        Rule("temperature_bias_{j}", f"{_OF_MODEL}.bias", "unit", copy="same"),
    ),
    needs=LORAMOE.needs | {"temperature_{j}", "temperature_bias_{j}"},
    fields=(
        *LORAMOE.fields,
        Field("scoring_func", "sparsegen_cfg.enabled", renamed({True: "sparsemax"})),
        Field("temperature_hidden_size", "sparsegen_cfg.hidden_sizes"),
    ),
    # sparsegen(z, lambda) = sparsemax(z / (1 - lambda)), 1 - lambda = 0.01 + softplus(-MLP(x)); 0.01 is not stored
    fixed={**LORAMOE.fixed, "router_temperature": 0.01},
    const={**LORAMOE.const, "sparsegen_cfg.enabled": (True,)},
    measured={"sparsegen_cfg.input_sizes": ("router", 1)},
    ignore=LORAMOE.ignore - {"sparsegen_cfg"},
    weights="adapter_model.bin",
    notes="sparsemax at a learned temperature, whose MLP all layers with equally many inputs share; one E, r and alpha "
    "for all modules",
)
