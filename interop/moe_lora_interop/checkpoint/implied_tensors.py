"""Which tensors a config implies, and what is wrong with those that are there."""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.modules import router_owners
from moe_lora_interop.disk.dtypes import STORED
from moe_lora_interop.disk.lazy import Tensor
from moe_lora_interop.errors import ConfigError
from moe_lora_interop.rules.tensors import axes_of

Slot = tuple[str, str]


def layout_problems(config: MoeLoraConfig, tensors: Mapping[Slot, Tensor]) -> list[str]:
    """Everything in which canonical tensors differ from what the config implies; empty if nothing."""
    modules = sorted({module for module, role in tensors if role in ("lora_A", "lora_B")})
    problems = list(_target_problems(config, modules))
    expected, misfits = _expected(config, modules)
    problems += misfits
    problems += [f"{_label(*slot)}: missing tensor" for slot in expected if slot not in tensors]
    known: dict[str, dict[str, int]] = {}
    for (module, role), tensor in tensors.items():
        if (module, role) not in expected:
            if not misfits:  # otherwise it may be right, and the config wrong
                shape = list(tensor.shape)
                problems.append(f"{_label(module, role)} {shape}: unexpected tensor, the config implies none")
            continue
        sizes = {**known.get(module, {}), **expected[module, role]}
        found = dict(_shape_problems(_label(module, role), role, tensor, sizes))
        problems.extend(found.values())
        if not found and role in ("lora_A", "lora_B"):
            problems.extend(_padding_problems(config, module, role, tensor))
        if not found and role in ("lora_A", "router") and "in" not in expected[module, role]:
            known.setdefault(module, {}).setdefault("in", tensor.shape[-1])
    for module in modules:
        dtypes = {tensors[module, role].dtype.name for role in ("lora_A", "lora_B") if (module, role) in tensors}
        if len(dtypes) > 1:
            problems.append(f"{module}: lora_A and lora_B are {' and '.join(sorted(dtypes))}, expected one dtype")
    return problems


def expected_tensors(config: MoeLoraConfig, modules: list[str]) -> dict[Slot, dict[str, int]]:
    """{(module, role): sizes of the axes that the config determines} for an adapter on `modules`.

    Raises:
        ConfigError: the config does not fit these modules.
    """
    expected, problems = _expected(config, modules)
    if problems:
        raise ConfigError("the config does not fit the modules", problems)
    return expected


def _expected(config: MoeLoraConfig, modules: list[str]) -> tuple[dict[Slot, dict[str, int]], list[str]]:
    """What the config implies for the modules that it fits, and why it does not fit others."""
    expected: dict[Slot, dict[str, int]] = {}
    fitting, problems = config.fitting(modules)
    for module in modules:
        if module not in fitting:
            expected |= {(module, "lora_A"): {}, (module, "lora_B"): {}}
            continue
        sizes = fitting[module]
        ranks = {"rank": sizes.rank}
        expected[module, "lora_A"] = {"expert": 1 if config.shared_lora_A else sizes.num_experts} | ranks
        expected[module, "lora_B"] = {"expert": sizes.num_experts} | ranks
    routed = [module for module, sizes in fitting.items() if sizes.has_router]
    try:
        for owner in router_owners(config, routed):
            experts = config.for_module(owner).num_experts if owner else config.num_experts
            logits = experts * config.n_splits * (len(routed) if config.layerwise else 1)
            expected |= _router_tensors(config, owner, logits)
    except ConfigError as error:
        problems.extend(error.problems)
    return expected, problems


def _router_tensors(config: MoeLoraConfig, owner: str, logits: int) -> dict[Slot, dict[str, int]]:
    tensors: dict[Slot, dict[str, int]] = {}
    if config.router_input == "task":
        tensors[owner, "task_embedding"] = {"task": config.num_tasks or 0, "dim": config.task_embedding_dim or logits}
    if config.scope != "model":
        if config.router_depth:
            codes = {"in": _codes(config, owner)} if config.router_input == "expert_activations" else {}
            tensors[owner, "router"] = {"logit": logits} | codes
            if config.router_bias:
                tensors[owner, "router_bias"] = {"logit": logits}
        if config.adaptive_threshold:
            tensors |= {(owner, "threshold"): {}, (owner, "threshold_bias"): {}}
        if width := config.temperature_hidden_size:
            tensors |= {(owner, "temperature_0"): {"unit": width}, (owner, "temperature_bias_0"): {"unit": width}}
            tensors |= {(owner, "temperature_1"): {"unit": 1, "in": width}, (owner, "temperature_bias_1"): {"unit": 1}}
        return tensors
    for j in range(config.router_depth):
        units = logits if j == config.router_depth - 1 else config.router_hidden_size or 0
        first = {"in": config.task_embedding_dim} if config.task_embedding_dim else {}
        inputs = first if j == 0 else {"in": config.router_hidden_size or 0}
        tensors[owner, f"router_{j}"] = {"unit": units} | inputs
        if config.router_bias:
            tensors[owner, f"router_bias_{j}"] = {"unit": units}
    return tensors


def _codes(config: MoeLoraConfig, module: str) -> int:
    """The numbers that A x of all experts is."""
    sizes = config.for_module(module)
    return sizes.rank * (1 if sizes.shared_lora_A else sizes.num_experts)


def _shape_problems(label: str, role: str, tensor: Tensor, sizes: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    axes = axes_of(role).split()
    shape = f"{label}: shape {list(tensor.shape)}"
    if tensor.dtype.name not in STORED:
        yield "dtype", f"{label}: dtype {tensor.dtype.name}, expected one of {', '.join(STORED)}"
    if len(axes) != tensor.ndim:
        yield "axes", f"{shape}, expected {len(axes)} axes [{', '.join(axes)}]"
        return
    for axis, found in zip(axes, tensor.shape, strict=True):
        wanted = sizes.get(axis, found)
        if found != wanted or found == 0:
            yield axis, f"{shape} [{', '.join(axes)}], found {axis} = {found}, expected {wanted or 'at least 1'}"


def _padding_problems(config: MoeLoraConfig, module: str, role: str, tensor: Tensor) -> Iterator[str]:
    """Values beyond an expert's own rank, which is smaller than its siblings': they must be zero."""
    fitting, _ = config.fitting([module])
    ranks = fitting[module].ranks if fitting else ()
    for expert, rank in enumerate(ranks if len(set(ranks)) > 1 else ()):
        beyond = tensor[expert, rank:] if role == "lora_A" else tensor[expert, :, rank:]
        if np.count_nonzero(beyond):
            yield f"{_label(module, role)}: expert {expert} has values beyond its rank {rank}, expected zeros"


def _label(module: str, role: str) -> str:
    return f"{module} {role}" if module else f"(model) {role}"


def _target_problems(config: MoeLoraConfig, modules: list[str]) -> Iterator[str]:
    """Whole modules that are missing or too many, as far as the config's targets tell without the base model."""
    targets = config.targets
    if not modules:
        yield f"no tensors, the config targets {targets.target_modules}"
    if targets.is_all_linear or targets.target_modules is None:
        return
    try:
        selected = set(targets.select(modules)) if modules else set()
    except ConfigError as error:
        yield from (f"target_modules {problem}" for problem in error.problems)
        return
    yield from (f"{m}: unexpected module, target_modules does not name it" for m in modules if m not in selected)
    if isinstance(targets.target_modules, list):
        for module in _gaps(modules, targets.target_modules):
            if targets.matches(module):
                yield f"{module}: missing module, the config targets it in every layer"


def _gaps(modules: list[str], names: list[str]) -> Iterator[str]:
    """A target named by its last part is expected in every layer in which its kind of module or a sibling occurs."""
    found: dict[tuple[str, str], set[str]] = {}
    endings = tuple(f".{name}" for name in names)
    for module in modules:
        if module.endswith(endings) and (numbered := re.fullmatch(r"(.*?\.)(\d+)(\..*)", module)):
            found.setdefault((numbered[1], numbered[3]), set()).add(numbered[2])
    layers: dict[str, set[str]] = {}
    for (prefix, _), numbers in found.items():
        layers.setdefault(prefix, set()).update(numbers)
    for (prefix, suffix), numbers in found.items():
        for number in sorted(layers[prefix] - numbers, key=int):
            yield f"{prefix}{number}{suffix}"
