"""Which mixtures vLLM can serve with this plugin, by which road otherwise, and with which --max-lora-rank.

A mixture is stacked as ONE LoRA: the rows of A of every expert, then zeros, then the router's rows at the end of the
rank axis. So the router's rows count towards the rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig
from moe_lora_interop.dialects.lora import PLAIN_LORA
from moe_lora_interop.dialects.native import NATIVE
from moe_lora_interop.errors import ConfigError

TRIED = ("0.32.0",)
"""The versions of vLLM that the plugin was tried with; others of the same minor version are accepted."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as --max-lora-rank."""
PARTS = 3
"""Rows that hold one row of a router exactly where the LoRA's dtype is bfloat16 or float16; with float32 it is 1."""
MAX_EXPERTS = 32
"""Logits that the gates of every layer are made for: their tables are allocated before any adapter is known."""

_TO_MIXTRAL = "`moe-lora export SRC DST --as mixtral --base BASE` writes a model that vLLM serves without this plugin"
_TO_TASK = "`moe-lora export SRC DST --as lora --task ID` writes a plain LoRA for a task"
_TO_LORA = "`moe-lora export SRC DST --as lora --gates FILE.json` writes a plain LoRA, with fixed gates"
_TO_PEFT = "PEFT runs it: `moe-lora run -- python SCRIPT.py`"
_HEADS = ("lm_head", "embed_tokens", "wte", "embed_out", "score", "classifier")


@dataclass(frozen=True)
class VllmNeeds:
    """What vLLM needs to serve an adapter's directory.

    Attributes:
        max_lora_rank: the least --max-lora-rank that is enough in every dtype; None: it cannot serve it.
        problems: why not, one line each with what does it instead.
        plugin: whether the plugin of the extra `vllm` is needed, too: not for a plain LoRA.
    """

    max_lora_rank: int | None
    problems: list[str]
    plugin: bool


def vllm_needs(layout: str, config: MoeLoraConfig, modules: Sequence[str]) -> VllmNeeds:
    """What vLLM needs to serve a directory in this layout.

    Args:
        layout: its name.
        config: the adapter's.
        modules: the modules that it changes (`Adapter.modules`).
    """
    plugin = layout != PLAIN_LORA.name
    if plugin and layout != NATIVE.name:
        problem = f"layout: found {layout}, expected native; `moe-lora convert SRC DST --to native` writes it"
        return VllmNeeds(None, [problem], plugin)
    found = problems(config, modules)
    return VllmNeeds(None if found else lora_rank(config, modules), found, plugin)


def problems(config: MoeLoraConfig, modules: Sequence[str], parts: int = PARTS) -> list[str]:
    """Why vLLM cannot serve this adapter, one line each with what does it instead; empty if it can.

    Args:
        config: the adapter's.
        modules: the modules that it changes (`Adapter.modules`).
        parts: as for `lora_rank`.
    """
    found = [*_module_problems(config, modules)]
    sizes, misfits = config.fitting(modules)
    found += misfits
    routed = {module: own for module, own in sizes.items() if own.has_router}
    if routed:
        found += _routing_problems(config)
        found += _size_problems(config, routed)
    if not found and (needed := rows(config, modules, parts)) > RANKS[-1]:
        found.append(
            f"rank: found {needed} rows of all experts and routers, expected at most {RANKS[-1]}; instead, {_TO_LORA}"
        )
    return found


def lora_rank(config: MoeLoraConfig, modules: Sequence[str], parts: int = PARTS) -> int:
    """The least --max-lora-rank with which vLLM can load this adapter.

    Args:
        config: the adapter's, without `problems`.
        modules: as for `problems`.
        parts: rows for each row of a router: 1 if vLLM computes in float32, else `PARTS`.

    Raises:
        ConfigError: it needs more than vLLM's largest.
    """
    needed = rows(config, modules, parts)
    for rank in RANKS:
        if rank >= needed:
            return rank
    raise ConfigError("too large for vLLM", [f"rank: found {needed} rows, expected at most {RANKS[-1]}"])


def rows(config: MoeLoraConfig, modules: Sequence[str], parts: int = PARTS) -> int:
    """The most rows of A that a module needs: r of every expert, `parts` for every row of its router.

    A router has a row for each expert, and one for an adaptive threshold.
    """
    needed = (
        sum(own.ranks) + parts * ((own.num_experts + config.adaptive_threshold) if own.has_router else 0)
        for own in config.for_modules(modules).values()
    )
    return max(needed, default=0)


def _routing_problems(config: MoeLoraConfig) -> Iterator[str]:
    if config.router_input == "task":
        yield f"router_input: found task, expected hidden; instead, {_TO_TASK}"
    elif config.scope == "ffn":
        yield f"scope: found ffn, expected linear; instead, {_TO_MIXTRAL}, or says why this mixture is no Mixtral"
    elif config.scope == "model":
        yield f"scope: found model, expected linear: its router reads a first pass; instead, {_TO_LORA}"
    if config.router_input == "expert_activations":
        yield f"router_input: found expert_activations, expected hidden; instead, {_TO_PEFT}"
    if config.mix == "weights":
        road = _TO_TASK if config.router_input == "task" else _TO_LORA
        yield f"mix: found weights, expected outputs; instead, {road}"
    if config.routing is not None:
        yield f"routing: found {config.routing['name']}, expected null; instead, {_TO_PEFT}"
    if config.temperature_hidden_size is not None:
        width = config.temperature_hidden_size
        yield f"temperature_hidden_size: found {width}, expected null; instead, {_TO_PEFT}"


def _size_problems(config: MoeLoraConfig, routed: dict[str, ModuleConfig]) -> Iterator[str]:
    most = MAX_EXPERTS - config.adaptive_threshold
    for module, own in routed.items():
        if own.num_experts > most:
            yield f"{module}: num_experts: found {own.num_experts}, expected at most {most}; instead, {_TO_LORA}"


def _module_problems(config: MoeLoraConfig, modules: Sequence[str]) -> Iterator[str]:
    if config.modules_to_save:
        yield f"modules_to_save: found {config.modules_to_save}, expected null; instead, {_TO_PEFT}"
    for module in modules:
        if module.rpartition(".")[2] in _HEADS:
            yield f"{module}: found an adapter on a head or on embeddings, expected linear layers; instead, {_TO_PEFT}"
        elif ".experts." in f"{module}.":
            yield f"{module}: found an adapter on the base's own experts, which vLLM fuses; instead, {_TO_PEFT}"
