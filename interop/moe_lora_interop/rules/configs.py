"""Between a layout's adapter_config.json and our config, by the fields of its `Dialect`."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from moe_lora_interop.config.adapter_config import BOOKKEEPING, MoeLoraConfig
from moe_lora_interop.config.modules import traversal_order
from moe_lora_interop.config.patterns import pattern_for
from moe_lora_interop.disk.lazy import Tensor
from moe_lora_interop.errors import ConfigError
from moe_lora_interop.rules.codecs import Values
from moe_lora_interop.rules.dialect import REQUIRED, SET, Dialect, lookup
from moe_lora_interop.rules.lora_fields import CHECKED, INERT, REFUSED

EMPTY: tuple[Any, ...] = (None, False, [], {}, "", 0)
EXPERT_CONST = {"peft_type": "LORA", "bias": "none"}
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(MoeLoraConfig)}
_UNWRITTEN = {*BOOKKEEPING, "init_lora_weights", "target_modules", "module_order", "peft_type", "format_version"}
_PATTERNS = {"r", "lora_alpha", "num_experts", "top_k"} | {n for n in _DEFAULTS if n.endswith("_pattern")}
_TARGETS = {"exclude_modules", "layers_to_transform", "layers_pattern"}


def config_of(
    dialect: Dialect, raw: Mapping[str, Any], tensors: Mapping[tuple[str, str], Tensor], options: Mapping[str, Any]
) -> MoeLoraConfig:
    """Our config for a layout's.

    Args:
        raw: their config, parsed.
        tensors: canonical; only their names and shapes count, where the layout leaves numbers to them.
        options: what the caller gave for `dialect.options`.

    Raises:
        ConfigError: fields that are missing, not understood or contradictory, and options that are missing; all listed.
    """
    problems = _option_problems(dialect, options)
    if dialect.own_config:
        return _own_config(raw, problems)
    modules = sorted({module for module, role in tensors if role == "lora_B"})
    ours: Values = {**dialect.fixed}
    problems = [*_unknown_fields(dialect, raw), *problems]
    if dialect.experts_from_tensors:
        _count_experts(tensors, modules, ours)
    for name, (role, axis) in dialect.counted.items():
        sizes = {t.shape[axis] for (_, found), t in tensors.items() if found == role}
        ours |= dict.fromkeys([name] if sizes else [], max(sizes, default=0))
        if len(sizes) > 1:
            problems.append(f"{name}: the tensors say {sorted(sizes)}, expected one number for all modules")
    problems += [
        f"{name}: found {lookup(raw, name, None)!r}, the tensors say {size}"
        for name, size in _measured(dialect, tensors)
        if not _repeats(lookup(raw, name, None), size)
    ]
    for field in dialect.fields:
        value = lookup(raw, field.theirs, field.default)
        if value is REQUIRED:
            if "experts" in raw or not (dialect.folders and dialect.folders.by_option):  # else an option is missing
                problems.append(f"{field.theirs}: missing field")
            continue
        _apply(field.codec.ours, field.ours, value, ours, modules, problems)
    for option in dialect.options:
        value = options.get(option.name, option.default)
        if value is not REQUIRED and option.field in _DEFAULTS:
            _apply(option.codec.ours, option.field, value, ours, modules, problems)
    if dialect.cases:
        problems.extend(_apply_case(dialect, raw, ours))
    ours["revision"] = raw.get("revision")
    if dialect.plain and isinstance(ours.get("num_experts"), int):
        plain = {m: 1 if (m, "router") not in tensors and tensors[m, "lora_B"].shape[0] == 1 else 0 for m in modules}
        if not dialect.fixed.get("scope") == "ffn" or any(plain.values()):
            ours["num_experts_pattern"] = pattern_for(plain, 0)
    if ours.get("layerwise"):
        ours["module_order"] = options.get("module_order") or traversal_order(modules)
    if problems:
        raise ConfigError(f"invalid {dialect.name} config", problems)
    return MoeLoraConfig(**ours)


def raw_of(
    dialect: Dialect, config: MoeLoraConfig, tensors: Mapping[tuple[str, str], Tensor], modules: list[str]
) -> dict[str, Any]:
    """Their config for ours: `config_of` read from the other side.

    Raises:
        ConfigError: the layout cannot express a value.
    """
    if dialect.own_config:
        return config.to_dict()
    raw: dict[str, Any] = {}
    for name, allowed in dialect.const.items():
        if allowed:
            _put(raw, name, allowed[0])
    for name, size in _measured(dialect, tensors):
        _put(raw, name, size)
    problems: list[str] = []
    for theirs, ours in dialect.cases:
        if all(_is(getattr(config, name), value) for name, value in ours.items()):
            raw.update({name: None if value is SET else value for name, value in theirs.items()})
            break
    for field in dialect.fields:
        try:
            _put(raw, field.theirs, field.codec.theirs(field.ours, config, modules))
        except ConfigError as error:
            problems.extend(error.problems)
        except (TypeError, ValueError):
            problems.append(f"{field.ours}: found {getattr(config, field.ours)!r}, which {field.theirs} cannot express")
    if problems:
        raise ConfigError(f"layout {dialect.name!r} cannot express the config", problems)
    return raw


def _own_config(raw: Mapping[str, Any], problems: list[str]) -> MoeLoraConfig:
    try:
        config = MoeLoraConfig.from_dict(raw)
    except ConfigError as error:
        raise ConfigError(error.what, [*problems, *error.problems]) from None
    if problems:
        raise ConfigError("invalid options", problems)
    return config


def recorded_fields(dialect: Dialect) -> set[str]:
    """The fields of our config that the layout's config says."""
    return set(_DEFAULTS) if dialect.own_config else {field.ours for field in dialect.fields}


def options_of(dialect: Dialect, config: MoeLoraConfig, modules: list[str]) -> dict[str, Any]:
    """The options with which reading the written directory gives this config again."""
    found = {o.name: o.codec.theirs(o.field, config, modules) for o in dialect.options if o.field in _DEFAULTS}
    if dialect.folders is not None and dialect.folders.by_option:
        found[dialect.folders.listed_in] = [dialect.folders.name.format(expert=n) for n in range(config.num_experts)]
    layerwise = config.layerwise and any(f.ours == "layerwise" for f in dialect.fields)
    return found | ({"module_order": config.module_order} if layerwise else {})


def differences(config: MoeLoraConfig, other: MoeLoraConfig, modules: list[str]) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs compute different functions on `modules`: {field: (value, other value)}."""
    found: dict[str, tuple[Any, Any]] = {}
    if config == other:
        return found
    for name in _DEFAULTS.keys() - _UNWRITTEN - _PATTERNS - _TARGETS:
        if getattr(config, name) != getattr(other, name):
            found[name] = (getattr(config, name), getattr(other, name))
    both = config.for_modules(modules), other.for_modules(modules)
    for name in ("num_experts", "ranks", "alphas", "top_k"):
        mine, theirs = ({m: getattr(s, name) for m, s in sizes.items()} for sizes in both)
        if mine != theirs:
            module = next(m for m in modules if mine[m] != theirs[m])
            ours = {"ranks": "r", "alphas": "lora_alpha"}.get(name, name)
            found[ours] = (mine[module], theirs[module])
    return dict(sorted(found.items()))


def _measured(dialect: Dialect, tensors: Mapping[tuple[str, str], Tensor]) -> Iterator[tuple[str, int | list[int]]]:
    """The fields of `measured` and what the tensors say."""
    for name, (role, axis) in dialect.measured.items():
        sizes = {module: tensor.shape[axis] for (module, of), tensor in tensors.items() if of == role}
        if sizes:
            yield name, sizes[""] if "" in sizes else sorted(set(sizes.values()))


def _repeats(value: Any, size: int | list[int]) -> bool:
    return isinstance(value, list) and all(n in value for n in size) if isinstance(size, list) else value == size


def _count_experts(tensors: Mapping[tuple[str, str], Tensor], modules: list[str], ours: Values) -> None:
    """E of a module is its router's rows; with a router for the model, that router's."""
    model = [t.shape[0] for (module, role), t in tensors.items() if module == "" and role == "router_0"]
    if model:
        ours["num_experts"] = model[0]
        return
    counts = {m: tensors.get((m, "router"), tensors[m, "lora_B"]).shape[0] for m in modules}
    ours["num_experts"] = max(counts.values(), default=1)
    ours["num_experts_pattern"] = pattern_for(counts, ours["num_experts"])


def _unknown_fields(dialect: Dialect, raw: Mapping[str, Any]) -> list[str]:
    known = {f.theirs for f in dialect.fields} | dialect.const.keys() | dialect.measured.keys() | set(BOOKKEEPING)
    known |= {name for theirs, _ in dialect.cases for name in theirs}
    if dialect.folders is not None:
        known |= {dialect.folders.listed_in, "experts"}
    if dialect.stride is not None:
        known.add(dialect.stride[0])
    problems = _unread(_unfolded(raw, known | dialect.ignore), known, dialect.ignore, dialect)
    of_expert = {name.removeprefix("experts.") for name in known if name.startswith("experts.")} | set(BOOKKEEPING)
    for number, expert in enumerate(raw.get("experts", []) if dialect.folders is not None else []):
        fields = {name: value for name, value in expert.items() if EXPERT_CONST.get(name) != value}
        problems += [f"expert {number}: {problem}" for problem in _unread(fields, of_expert, INERT, dialect)]
    return [*problems, *dialect.const_problems(raw)]


def _unread(fields: Mapping[str, Any], known: Collection[str], ignore: Collection[str], dialect: Dialect) -> list[str]:
    """The fields with a value that nothing here honours and that may not be ignored."""
    problems = []
    for name, value in fields.items():
        if name in known:
            continue
        if name in ignore:
            why = CHECKED[name](value) if name in CHECKED else ""
        elif value in EMPTY:
            continue
        elif name in REFUSED:
            why = f"which means {REFUSED[name]}; layout {dialect.name!r} has only A and B: train without it"
        else:
            why = f"layout {dialect.name!r} has no meaning for it here"
        problems += [f"{name}: found {value!r}, {why}"] if why else []
    return problems


def refusals(raw: Mapping[str, Any]) -> list[str]:
    """The fields that make more of an adapter than any layout has, with what they mean."""
    found = ((name, value) for name, value in raw.items() if name in REFUSED and value not in EMPTY)
    return [f"{name}: found {value!r}, which means {REFUSED[name]}" for name, value in found]


def _unfolded(raw: Mapping[str, Any], known: Collection[str], prefix: str = "") -> dict[str, Any]:
    """The fields, with those of an object as "a.b" where some of them are known by such a name."""
    fields: dict[str, Any] = {}
    for name, value in raw.items():
        path = prefix + name
        if isinstance(value, Mapping) and path not in known and any(k.startswith(f"{path}.") for k in known):
            fields |= _unfolded(value, known, f"{path}.")
        else:
            fields[path] = value
    return fields


def _option_problems(dialect: Dialect, options: Mapping[str, Any]) -> list[str]:
    known = {o.name: o for o in dialect.options}
    extra = {"module_order"} if any(f.ours == "layerwise" for f in dialect.fields) else set()
    problems = [
        f"option {name}: layout {dialect.name!r} takes {', '.join(sorted(known)) or 'no options'}"
        for name in options
        if name not in known and name not in extra
    ]
    return problems + [
        f"option {o.name}: missing, and the layout does not record it: {o.what}"
        for o in known.values()
        if o.default is REQUIRED and o.name not in options
    ]


def _apply(read: Any, name: str, value: Any, ours: Values, modules: list[str], problems: list[str]) -> None:
    try:
        read(name, value, ours, modules)
    except ConfigError as error:
        problems.extend(error.problems)
    except (TypeError, KeyError, ValueError, IndexError, ArithmeticError):
        problems.append(f"{name}: found {value!r}, which this layout cannot have")


def _apply_case(dialect: Dialect, raw: Mapping[str, Any], ours: Values) -> list[str]:
    for theirs, values in dialect.cases:
        if all(_is(raw.get(name), value) for name, value in theirs.items()):
            ours.update({name: value for name, value in values.items() if value is not SET})
            return []
    names = sorted({name for theirs, _ in dialect.cases for name in theirs})
    return [f"{', '.join(f'{n} = {raw.get(n)!r}' for n in names)}: this combination is not supported"]


def _is(value: Any, wanted: Any) -> bool:
    return value is not None if wanted is SET else value == wanted


def _put(raw: dict[str, Any], path: str, value: Any) -> None:
    head, _, rest = path.partition(".")
    if head == "experts" and rest:
        experts = raw.setdefault("experts", [{} for _ in value])
        for expert, of_expert in zip(experts, value, strict=True):
            _put(expert, rest, of_expert)
    elif rest:
        _put(raw.setdefault(head, {}), rest, value)
    else:
        raw[head] = value
