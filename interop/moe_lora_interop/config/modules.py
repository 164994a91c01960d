"""Modules and their places in a model: in which order, in which block, and where the routers that serve them stand."""

import re
from collections.abc import Iterable

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.errors import ConfigError

# Order of definition in the decoder layers of transformers (named_modules order): Llama and those like it; Phi-3.
_WITHIN_LAYER = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "qkv_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
)
_LAST_IN_BLOCK = ("down_proj", "fc2", "w2", "wo", "c_proj", "dense_4h_to_h")


def traversal_order(modules: Iterable[str]) -> list[str]:
    """The modules by layer, and within a layer as transformers defines them: for layouts that number and do not name.

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


def order_problems(config: MoeLoraConfig, routed: list[str]) -> list[str]:
    """What is wrong with `module_order`, if the config states it, as an order of a layerwise router's modules."""
    order = config.module_order
    if order is None or sorted(order) == sorted(routed):
        return []
    missing, unknown = sorted(set(routed) - set(order)), sorted(set(order) - set(routed))
    found = f"without {missing or 'nothing'} that is routed and with {unknown or 'nothing'} that is not"
    return [f"module_order: {found}, expected every routed module once"]


def block_of(module: str) -> str:
    """The feed-forward block that a linear layer belongs to: its parent."""
    return module.rpartition(".")[0]


def last_layer(layers: dict[str, tuple[int, int]]) -> str | None:
    """The layer of a block whose output is the block's: by its name, or the only one that narrows; None if unclear.

    Args:
        layers: {name: (in_features, out_features)}.
    """
    named = [name for name in layers if name in _LAST_IN_BLOCK]
    narrowing = [name for name, (size_in, size_out) in layers.items() if size_out < size_in]
    found = named if len(named) == 1 else narrowing
    return found[0] if len(found) == 1 else None


def last_bias_problem(config: MoeLoraConfig, layer: str) -> str | None:
    """Why the last layer of a block of experts cannot have a bias b, or None: sum g_e b = b if the gates sum to 1."""
    if config.gates_sum_to_one:
        return None
    wanted = "norm_topk_prob without threshold, registered routing, scaling factor or expert_dropout"
    return f"{layer}: has a bias, so the gates must sum to 1; expected {wanted}"


def router_owners(config: MoeLoraConfig, routed: list[str]) -> list[str]:
    """Where the routers of these modules stand: at each module, at its feed-forward block, or at the model ("").

    Raises:
        ConfigError: the modules of a feed-forward block have different numbers of experts.
    """
    if config.scope == "linear":
        return routed
    if config.scope == "model":
        return [""] if routed else []
    blocks: dict[str, dict[str, int]] = {}
    for module, sizes in config.for_modules(routed).items():
        blocks.setdefault(block_of(module), {})[module] = sizes.num_experts
    own = config.for_modules(blocks)
    uneven = [
        f"{block}: its layers have different num_experts {experts}, expected {own[block].num_experts}"
        for block, experts in blocks.items()
        if set(experts.values()) != {own[block].num_experts}
    ]
    if uneven:
        raise ConfigError("one router per feed-forward block needs one num_experts", uneven)
    return list(blocks)
