"""Rules with no direction: the only place where a tensor's name or an axis moves.

A `Rule` says what a stored tensor *is*: a name template and axes on the stored side, a module template and axes on the
canonical side. An axis lives either in the name (`{expert}`) or in the tensor (`expert`), on either side, so that
stacking, unstacking, splitting, concatenating and transposing are all one statement, read both ways by `move`.

    Rule("lora_A", "base_model.model.{module}.moe_lora_A", "expert rank in")            # one stacked tensor
    Rule("lora_A", "base_model.model.{module}.lora_A{expert}.weight", "rank in")         # one tensor per expert
    Rule("lora_A", "{module}.lora_A.weight", "(expert rank) in")                         # concatenated along the rank
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from moe_lora_interop.disk import lazy, limits
from moe_lora_interop.disk.lazy import Tensor

# Canonical axes of every role. `rank` is the rank of ONE expert; experts of smaller rank are zero-padded.
ROLES = {
    "lora_A": "expert rank in",
    "lora_B": "expert out rank",
    "router": "logit in",
    "router_bias": "logit",
    "threshold": "in",
    "threshold_bias": "",
    "temperature_{j}": "unit in",
    "temperature_bias_{j}": "unit",
    "task_embedding": "task dim",
    "router_{j}": "unit in",
    "router_bias_{j}": "unit",
    # of layouts that have them in place of ours (`derived`)
    "core": "expert rank code",
    "up": "unit out rank",
    "up_logits": "task unit",
    "task_matrix": "task rank code",
    "task_diagonal": "task rank",
}
# `logit` counts a router's outputs: the experts, times splits or layers where there are any; `one` has size 1.
AXES = frozenset("expert rank code in out layer one logit unit split task dim head".split())
# no axes: j numbers the layers of a router; width is the size of the axis `in` of the layers that share a tensor
NUMBERS = AXES | {"j", "width"}


def axes_of(role: str) -> str:
    """Canonical axes of a role; "router_0" has those of "router_{j}"."""
    return ROLES[re.sub(r"_\d+$", "_{j}", role)]


Slot = tuple[str, str]
"""(module, role)."""
Canonical = dict[Slot, Tensor]
Sizes = Callable[[str], Mapping[str, int | tuple[int, ...]]]
"""Canonical module path -> {"expert": E, "rank": (r_0, ..., r_{E-1})}: what only the config knows."""


@dataclass(frozen=True)
class Side:
    """One side of a rule: a name template and the tensor's axes, e.g. `{module}.lora_b` and `expert rank out`."""

    name: str
    axes: str

    @cached_property
    def strides(self) -> dict[str, int]:
        """The placeholders in order, each with its stride: {j*3} stands for 0, 3, 6, ..."""
        return {name: int(stride or 1) for name, stride in re.findall(r"{(\w+)(?:\*(\d+))?}", self.name)}

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the placeholders."""
        return tuple(self.strides)

    @cached_property
    def shape(self) -> tuple[tuple[str, ...], ...]:
        """The axes of each stored dimension; "(expert rank) in" gives (("expert", "rank"), ("in",))."""
        return tuple(tuple(part.strip("()").split()) for part in re.findall(r"\([^)]*\)|\S+", self.axes))

    @cached_property
    def atoms(self) -> tuple[str, ...]:
        """The axes one by one, joined ones apart."""
        return tuple(itertools.chain.from_iterable(self.shape))

    @cached_property
    def _ending(self) -> str:
        return self.name.rpartition("}")[2]

    @cached_property
    def regex(self) -> re.Pattern[str]:
        pattern = re.escape(re.sub(r"\*\d+}", "}", self.name))
        for field in self.fields:
            value = r"0|[1-9][0-9]{0,8}" if field in NUMBERS else r".+"
            pattern = pattern.replace(rf"\{{{field}\}}", f"(?P<{field}>{value})", 1)
        return re.compile(pattern, re.DOTALL)

    def bind(self, name: str) -> dict[str, str] | None:
        """The placeholders' values in `name`, or None where it does not match."""
        found = self.regex.fullmatch(name) if name.endswith(self._ending) else None  # the check alone is quick
        if found is None:
            return None
        bound = found.groupdict()
        for field, stride in self.strides.items():
            if stride > 1:
                number, rest = divmod(int(bound[field]), stride)
                if rest:
                    return None
                bound[field] = str(number)
        return bound

    def format(self, bound: Mapping[str, str | int]) -> str:
        """The name with these values: the inverse of `bind`."""
        plain = re.sub(r"\*\d+}", "}", self.name)
        return plain.format(
            **{k: int(v) * self.strides[k] if self.strides.get(k, 1) > 1 else v for k, v in bound.items()}
        )


@dataclass(frozen=True)
class Rule:
    """What one family of stored tensors is.

    Args:
        role: a key of `ROLES`.
        key: stored name template; a folder is part of the name. With `{width}` it is a tensor that all modules of this
            width share, stored under every module whatever its own width: canonical tensors are those of each module.
        axes: stored axes; parentheses join several into one dimension.
        module: template of the canonical module path; "" is the model itself.
        canonical_axes: the same tensor's canonical axes, where joined axes must be told apart.
        copy: "" for a tensor of its own; "same" for a duplicate of another rule's tensor, compared bit by bit when read
            and written only on request; "stale" for one that may be older than the tensor itself: written, never read;
            "dead" for one that no forward pass uses: ignored, never written; "base" for one of the base model: never
            written (see `base_tensors`).
    """

    role: str
    key: str
    axes: str
    module: str = "{module}"
    canonical_axes: str = ""
    copy: Literal["", "same", "stale", "dead", "base"] = ""

    @cached_property
    def stored(self) -> Side:
        return Side(self.key, self.axes)

    @cached_property
    def canonical(self) -> Side:
        return Side(f"{self.module}|{self.role}", self.canonical_axes or axes_of(self.role))

    @property
    def lacks_experts(self) -> bool:
        """Whether the stored side has no expert axis although the role has one: plain LoRA, or one shared A."""
        return "expert" in self.canonical.atoms and "expert" not in (*self.stored.atoms, *self.stored.fields)


def claim(rules: Iterable[Rule], key: str, ndim: int) -> Rule | None:
    """The most specific rule for a stored key: shortest wildcards, then fewest axes."""
    matches = [
        (sum(len(v) for k, v in found.items() if k not in NUMBERS), len(rule.stored.shape), i, rule)
        for i, rule in enumerate(rules)
        if len(rule.stored.shape) == ndim and (found := rule.stored.bind(key)) is not None
    ]
    return min(matches)[3] if matches else None


def decode(rules: Sequence[Rule], stored: Mapping[str, Tensor], sizes: Sizes) -> tuple[Canonical, list[str]]:
    """Stored tensors -> ({(module, role): canonical tensor}, problems). Values are moved, never changed."""
    by_rule, problems = claimed(rules, stored)
    canonical, copies = moved(by_rule, sizes, problems)
    return canonical, [*problems, *differing(copies)]


ByRule = dict[Rule, dict[str, Tensor]]
Copies = list[tuple[str, Tensor, Tensor]]
"""(what it is, the tensor, its duplicate)."""


def claimed(rules: Sequence[Rule], stored: Mapping[str, Tensor]) -> tuple[ByRule, list[str]]:
    """The first third of `decode`: which rule each tensor follows, and the tensors that follow none."""
    by_rule: ByRule = {}
    problems = []
    for key, tensor in stored.items():
        rule = claim(rules, key, tensor.ndim)
        if rule is None:
            problems.append(f"{key} {list(tensor.shape)}: unexpected tensor, no rule of this layout describes it")
        elif rule.copy not in ("stale", "dead"):
            by_rule.setdefault(rule, {})[key] = tensor
    return by_rule, problems


def moved(by_rule: ByRule, sizes: Sizes, problems: list[str]) -> tuple[Canonical, Copies]:
    """The second: tensors in canonical axes, and the duplicates among them. It reads no tensor that is in a file."""
    canonical: Canonical = {}
    copies: Copies = []
    own = {rule: tensors for rule, tensors in by_rule.items() if rule.copy != "base"}
    firsts: dict[Slot, Tensor] = {}
    # "" before "same", and what shows the modules' widths before what is shared by width
    for rule, tensors in sorted(own.items(), key=lambda item: ("width" in item[0].stored.fields, item[0].copy)):
        if "width" in rule.stored.fields:
            tensors = _of_own_width(rule, tensors, canonical, firsts, copies)
        for name, tensor in move(tensors, rule.stored, rule.canonical, sizes, problems):
            module, role = name.rsplit("|", 1)
            first = canonical.setdefault((module, role), tensor)
            if rule.copy == "" and first is not tensor:
                problems.append(f"{module} {role}: stored twice, under different names")
            elif rule.copy == "same":
                copies.append((f"{rule.key} of {module}", first, tensor))
    return canonical, copies


def _of_own_width(
    rule: Rule, tensors: Mapping[str, Tensor], canonical: Canonical, firsts: dict[Slot, Tensor], copies: Copies
) -> dict[str, Tensor]:
    """Those that their module uses. Every other one is a duplicate of the first of its width."""
    used = {}
    for key, tensor in tensors.items():
        bound = rule.stored.bind(key)
        assert bound is not None
        copies.append((key, firsts.setdefault((rule.role.format(**bound), bound["width"]), tensor), tensor))
        a = canonical.get((bound.get("module", ""), "lora_A"))
        if a is not None and a.shape[-1] == int(bound["width"]):
            used[key] = tensor
    return used


def differing(copies: Copies) -> list[str]:
    """The third: duplicates that are none, which takes reading both."""
    return [
        f"{label}: differs from the tensor that it duplicates"
        for label, first, copy in copies
        if first is not copy and (first.shape != copy.shape or first.tobytes() != copy.tobytes())
    ]


def encode(
    rules: Sequence[Rule], canonical: Mapping[Slot, Tensor], sizes: Sizes, *, duplicates: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Canonical tensors -> (stored tensors, problems): `decode` read from the other side."""
    by_rule: ByRule = {}
    problems = []
    for (module, role), tensor in canonical.items():
        name = f"{module}|{role}"
        fitting = [r for r in rules if r.copy in ("", "same", "stale") and r.canonical.bind(name) is not None]
        if len({r.lacks_experts for r in fitting}) > 1:
            plain = sizes(module).get("expert") == 1
            fitting = [r for r in fitting if r.lacks_experts == plain]
        copies = ("same", "stale") if duplicates else ("stale",)
        chosen = [r for r in fitting if r.copy in copies] + [r for r in fitting if r.copy == ""][:1]
        if not fitting:
            problems.append(f"{name.replace('|', ' ').strip()}: this layout has no place for it")
        for rule in chosen:
            by_rule.setdefault(rule, {})[name] = tensor
    stored: dict[str, Tensor] = {}
    for rule, tensors in by_rule.items():
        if "width" in rule.stored.fields:
            for side, shared in _by_width(rule, tensors, canonical, duplicates, problems):
                stored.update(move(shared, rule.canonical, side, sizes, problems))
        else:
            stored.update(move(tensors, rule.canonical, rule.stored, sizes, problems))
    return stored, problems


def _by_width(
    rule: Rule, tensors: Mapping[str, Tensor], canonical: Mapping[Slot, Tensor], duplicates: bool, problems: list[str]
) -> Iterator[tuple[Side, dict[str, Tensor]]]:
    """`_of_own_width` read from the other side: the stored side of every width, and what goes there."""
    widths = {module: tensor.shape[-1] for (module, role), tensor in canonical.items() if role == "lora_A"}
    firsts: dict[int, dict[str, tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        module, role = name.rsplit("|", 1)
        other, first = firsts.setdefault(widths[module], {}).setdefault(role, (module, tensor))
        if differing([("", first, tensor)]) and not rule.copy:
            problems.append(
                f"{module} {role}: differs from that of {other}, and in this layout all modules with "
                f"{widths[module]} inputs share it"
            )
    for width, shared in firsts.items():
        modules = [module for module, own in widths.items() if duplicates or own == width]
        part = {f"{module}|{role}": tensor for module in modules for role, (_, tensor) in shared.items()}
        yield Side(rule.key.replace("{width}", str(width)), rule.axes), part


def move(
    tensors: Mapping[str, Tensor], source: Side, target: Side, sizes: Sizes, problems: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Moves tensors from one side of a rule to the other; problems are appended, the tensors concerned left out."""
    groups: dict[tuple[tuple[str, str], ...], dict[tuple[int, ...], str]] = {}
    stacked = tuple(f for f in source.fields if f in AXES and f not in target.fields)
    for name in tensors:
        bound = source.bind(name)
        assert bound is not None
        shared = tuple((k, v) for k, v in bound.items() if k not in stacked)
        groups.setdefault(shared, {})[tuple(int(bound[a]) for a in stacked)] = name
    for shared, names in groups.items():
        try:
            yield from _move_group(tensors, dict(shared), names, stacked, source, target, sizes)
        except _Misfit as misfit:
            problems.extend(misfit.problems)


class _Misfit(Exception):
    def __init__(self, *problems: str):
        self.problems = problems


def _move_group(
    tensors: Mapping[str, Tensor],
    shared: dict[str, str],
    names: dict[tuple[int, ...], str],
    stacked: tuple[str, ...],
    source: Side,
    target: Side,
    sizes: Sizes,
) -> Iterator[tuple[str, Tensor]]:
    canonical = target if "|" in target.name else source
    # where the canonical name has a number and the other side an axis, any number stands for all
    known = sizes(canonical.format({**dict.fromkeys(canonical.fields, 0), **shared}).rsplit("|", 1)[0])
    array = _stack(tensors, shared, names, stacked, source, known)
    atoms = [*stacked, *source.atoms]
    counts, dims = array.shape[: len(stacked)], array.shape[len(stacked) :]
    array = array.reshape((*counts, *_split(dims, source, known, names)))

    unstacked = tuple(f for f in target.fields if f in AXES and f not in source.fields)
    wanted = [*unstacked, *target.atoms]
    for axis in [a for a in atoms if a not in wanted]:  # an axis absent on the other side has size 1
        where = atoms.index(axis)
        if array.shape[where] != 1:
            raise _Misfit(f"{_first(names)}: axis {axis!r} has size {array.shape[where]}, this layout can hold only 1")
        array = array.reshape(array.shape[:where] + array.shape[where + 1 :])
        atoms.remove(axis)
    for axis in [a for a in wanted if a not in atoms]:
        array = array[None]
        atoms.insert(0, axis)
    array = array.transpose([atoms.index(a) for a in wanted])

    joined = {axis for axes in target.shape if len(axes) > 1 for axis in axes}
    for axis, size in zip(wanted, array.shape, strict=True):
        expected = _size(known, axis)
        if (axis in unstacked or axis in joined) and expected is not None and size != expected:
            raise _Misfit(f"{_first(names)}: has {size} {axis}{'s' * (size != 1)}, this layout holds {expected}")
    for index in np.ndindex(array.shape[: len(unstacked)]):
        places = dict(zip(unstacked, index, strict=True))
        part = _cut_rank(array[index] if index else array, _first(names), target, places, known)
        shape = _joined(part.shape, target)
        yield target.format({**shared, **places}), part.reshape(shape)


def _stack(
    tensors: Mapping[str, Tensor],
    shared: dict[str, str],
    names: dict[tuple[int, ...], str],
    stacked: tuple[str, ...],
    source: Side,
    known: Mapping[str, int | tuple[int, ...]],
) -> Tensor:
    """Puts the tensors that differ by a number in their name side by side, zero-padding unequal ranks."""
    if not stacked:
        return tensors[names[()]]
    counts = [_size(known, axis) or 1 + max(i[n] for i in names) for n, axis in enumerate(stacked)]
    if math.prod(counts) > 2 * len(names) + 1000:  # a hostile number, or nearly everything is missing
        raise _Misfit(f"{_first(names)}: found {len(names)} tensors of its kind, {stacked} counts to {counts}")
    grid = list(itertools.product(*map(range, counts)))
    label = lambda index: source.format({**shared, **dict(zip(stacked, index, strict=True))})  # noqa: E731
    problems = [f"{label(i)}: missing tensor" for i in grid if i not in names]
    beyond = sorted(names.keys() - set(grid))
    problems += [f"{names[i]}: unexpected tensor, {stacked} counts to {counts}" for i in beyond]
    if problems:
        raise _Misfit(*problems)
    parts = [tensors[names[i]] for i in grid]
    problems = list(_rank_problems(parts, [names[i] for i in grid], grid, stacked, source, known))
    if problems:
        raise _Misfit(*problems)
    if len({p.dtype for p in parts}) > 1:
        found = ", ".join(sorted({str(p.dtype) for p in parts}))
        raise _Misfit(f"{_first(names)}: the experts' dtypes differ ({found}), expected one dtype")
    shape = tuple(max(sizes) for sizes in zip(*(p.shape for p in parts), strict=True))
    for n, part in enumerate(parts):
        ragged = [d for d, axes in enumerate(source.shape) if part.shape[d] != shape[d] and axes != ("rank",)]
        if ragged:
            raise _Misfit(f"{names[grid[n]]}: shape {list(part.shape)}, expected {list(shape)} like its siblings")
    padded, stored = math.prod(shape) * len(parts) * parts[0].itemsize, sum(p.nbytes for p in parts)
    if limits.is_inflated(padded, stored):
        raise _Misfit(f"{_first(names)}: {stored} bytes of unequal ranks, which padded to one rank are {padded}")
    return lazy.stack(parts, tuple(counts), shape)


def _rank_problems(
    parts: list[Tensor],
    names: list[str],
    grid: list[tuple[int, ...]],
    stacked: tuple[str, ...],
    source: Side,
    known: Mapping[str, int | tuple[int, ...]],
) -> Iterator[str]:
    """Experts stored on their own whose rank is not the config's."""
    ranks = known.get("rank")
    if not isinstance(ranks, tuple) or "expert" not in stacked or ("rank",) not in source.shape:
        return
    where = source.shape.index(("rank",))
    for part, name, index in zip(parts, names, grid, strict=True):
        expected = ranks[index[stacked.index("expert")]]
        if part.shape[where] != expected:
            yield f"{name}: shape {list(part.shape)}, found rank = {part.shape[where]}, expected {expected}"


def _split(
    shape: tuple[int, ...], side: Side, known: Mapping[str, int | tuple[int, ...]], names: dict[tuple[int, ...], str]
) -> Iterator[int]:
    """Sizes of the axes one by one; one axis of a joined dimension may be unknown and is then computed."""
    for size, axes in zip(shape, side.shape, strict=True):
        parts = [_size(known, a) if len(axes) > 1 else size for a in axes]
        unknown = parts.count(None)
        rest = math.prod(p for p in parts if p is not None)
        if unknown > 1 or (unknown == 0 and rest != size) or rest == 0 or size % rest:
            raise _Misfit(f"{_first(names)}: dimension ({' '.join(axes)}) has size {size}, expected {parts} multiplied")
        yield from (size // rest if p is None else p for p in parts)


def _size(known: Mapping[str, int | tuple[int, ...]], axis: str) -> int | None:
    value = known.get(axis)
    return max(value) if isinstance(value, tuple) else value


def _joined(shape: tuple[int, ...], side: Side) -> tuple[int, ...]:
    sizes = iter(shape)
    return tuple(math.prod(next(sizes) for _ in axes) for axes in side.shape)


def _cut_rank(
    array: Tensor,
    name: str,
    side: Side,
    places: Mapping[str, int],
    known: Mapping[str, int | tuple[int, ...]],
) -> Tensor:
    """Removes the zero padding of an expert that is stored on its own."""
    ranks = known.get("rank")
    if "expert" not in places or "rank" not in side.atoms or not isinstance(ranks, tuple):
        return array
    rank, where = ranks[places["expert"]], side.atoms.index("rank")
    found, before = array.shape[where], (slice(None),) * where
    if rank > found or (rank < found and np.count_nonzero(array[(*before, slice(rank, None))])):
        raise _Misfit(f"{name}: expert {places['expert']} has rank {rank} in the config, but values of rank {found}")
    return array if rank == found else array[(*before, slice(rank))]


def _first(names: dict[tuple[int, ...], str]) -> str:
    return names[min(names)]
