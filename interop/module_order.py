"""The order in which a model's modules are traversed, for layouts that number modules without naming them."""

import re
from collections.abc import Iterable

from interop.errors import ConfigError

# Order of definition in the decoder layers of transformers (named_modules order): Llama, Mistral, Qwen, Gemma.
_WITHIN_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def traversal_order(modules: Iterable[str]) -> list[str]:
    """The modules by layer, and within a layer as transformers defines them.

    Raises:
        ConfigError: a module's place is not known; the option `module_order` must then be given.
    """
    names = list(modules)
    unknown = sorted({m.rsplit(".", 1)[-1] for m in names} - set(_WITHIN_LAYER))
    if unknown:
        problem = f"option module_order: missing, the order of {', '.join(unknown)} among the modules is not known"
        raise ConfigError("unknown module order", [problem])
    return sorted(names, key=lambda m: (_numbers(m), _WITHIN_LAYER.index(m.rsplit(".", 1)[-1])))


def _numbers(module: str) -> list[int]:
    return [int(n) for n in re.findall(r"\.(\d+)\.", module)]
