"""Which tensors a config implies, and what is wrong with those that are there."""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from interop.config import MoeLoraConfig
from interop.errors import ConfigError
from interop.rules import ROLES

DTYPES = ("float32", "bfloat16", "float16")


def layout_problems(config: MoeLoraConfig, tensors: Mapping[tuple[str, str], np.ndarray]) -> list[str]:
    """Everything in which canonical tensors differ from what the config implies; empty if nothing."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for (module, role), tensor in tensors.items():
        modules.setdefault(module, {})[role] = tensor
    problems = list(_target_problems(config, list(modules)))
    for module, of_module in modules.items():
        try:
            problems.extend(_module_problems(config, module, of_module))
        except ConfigError as error:
            problems.extend(error.problems)
    return problems


def expected_roles(config: MoeLoraConfig, module: str) -> list[str]:
    """The roles that a module has under this config."""
    roles = ["lora_A", "lora_B"]
    if config.for_module(module).has_router:
        roles += ["router"] + ["router_bias"] * config.router_bias
        roles += ["threshold", "threshold_bias"] * config.adaptive_threshold
    return roles


def _module_problems(config: MoeLoraConfig, module: str, tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    expected = expected_roles(config, module)
    for role in expected:
        if role not in tensors:
            yield f"{module} {role}: missing tensor"
    sizes = config.for_module(module)
    known: dict[str, int] = {"rank": sizes.rank, "expert": sizes.num_experts}
    for role, tensor in tensors.items():
        axes = ROLES.get(role, "").split()
        if role not in expected:
            yield f"{module} {role} {list(tensor.shape)}: unexpected tensor, the config implies {', '.join(expected)}"
            continue
        if tensor.dtype.name not in DTYPES:
            yield f"{module} {role}: dtype {tensor.dtype.name}, expected one of {', '.join(DTYPES)}"
        if len(axes) != tensor.ndim:
            yield f"{module} {role}: shape {list(tensor.shape)}, expected {len(axes)} axes [{', '.join(axes)}]"
            continue
        if 0 in tensor.shape:
            yield f"{module} {role}: shape {list(tensor.shape)} is empty, expected [{', '.join(axes)}]"
        for axis, found in zip(axes, tensor.shape, strict=True):
            wanted = (
                1 if axis == "expert" and role == "lora_A" and sizes.shared_lora_A else known.setdefault(axis, found)
            )
            if found != wanted:
                yield (
                    f"{module} {role}: shape {list(tensor.shape)} [{', '.join(axes)}], found {axis} = {found}, "
                    f"expected {wanted}"
                )
    dtypes = {tensors[role].dtype.name for role in ("lora_A", "lora_B") if role in tensors}
    if len(dtypes) > 1:
        yield f"{module}: lora_A and lora_B have dtypes {' and '.join(sorted(dtypes))}, expected one dtype"


def _target_problems(config: MoeLoraConfig, modules: list[str]) -> Iterator[str]:
    """Whole modules that are missing or too many, as far as the config's targets tell without the base model."""
    targets = config.targets
    if targets.is_all_linear or targets.target_modules is None:
        return
    try:
        selected = set(targets.select(modules)) if modules else set()
    except ConfigError as error:
        yield from (f"target_modules {problem}" for problem in error.problems)
        return
    if not modules:
        yield f"no tensors, the config targets {targets.target_modules}"
    yield from (f"{m}: unexpected module, target_modules does not name it" for m in modules if m not in selected)
    if isinstance(targets.target_modules, list):
        yield from (
            f"{m}: missing module, the config targets it in every layer"
            for m in _gaps(modules, targets.target_modules)
            if targets.matches(m)
        )


def _gaps(modules: list[str], names: list[str]) -> Iterator[str]:
    """A target named by its last part is expected in every layer in which its kind of module or a sibling occurs."""
    found: dict[tuple[str, str], set[str]] = {}
    for module in modules:
        for name in names:
            numbered = re.fullmatch(r"(.*?\.)(\d+)(\..*)", module)
            if module != name and module.endswith(f".{name}") and numbered:
                found.setdefault((numbered[1], numbered[3]), set()).add(numbered[2])
    layers: dict[str, set[str]] = {}
    for (prefix, _), numbers in found.items():
        layers.setdefault(prefix, set()).update(numbers)
    for (prefix, suffix), numbers in found.items():
        for number in sorted(layers[prefix] - numbers, key=int):
            yield f"{prefix}{number}{suffix}"
