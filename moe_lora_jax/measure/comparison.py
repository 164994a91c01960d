"""Two adapters side by side: their configs, their weights, their gates on a text, their loss on data."""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.checkpoint.read_write import read_with_base
from moe_lora_interop.checkpoint.run_records import read_settings
from moe_lora_interop.config.adapter_config import BOOKKEEPING, MoeLoraConfig
from moe_lora_interop.config.in_words import routing_in_words
from moe_lora_interop.errors import ConfigError, printable
from moe_lora_jax.adapters.apply import remove_moe_lora
from moe_lora_jax.adapters.checkpoint import load_adapter, to_adapter
from moe_lora_jax.adapters.projections import by_projection
from moe_lora_jax.layers.router_outputs import MODEL
from moe_lora_jax.measure.tables import html_table
from moe_lora_jax.measure.text_gates import TextGates, text_gates
from moe_lora_jax.train.data import TokenData
from moe_lora_jax.train.evaluation import evaluate
from moe_lora_jax.tree import has_adapter

Source = nnx.Module | Adapter | str | os.PathLike[str]
ROLES = {"lora_A": "A", "lora_B": "B", "router": "router"}  # others follow under their own names


class GatesApart(NamedTuple):
    """distance: mean over tokens of half the sum of |g - h|, 0 alike, 1 disjoint. same_first: part of the tokens whose
    largest gate is of the same expert.
    """

    distance: float
    same_first: float


@dataclass(frozen=True)
class Comparison:
    """Two adapters; shows itself as tables in rich, Jupyter and `print`.

    names: of the two. config: {field: its two values}, in words, of those that differ. weights: {module: {tensor:
    cosine}}, NaN where one of the two is zero, or why there is none. gates: {router: `GatesApart`}, or why not; empty
    without a text. losses: {name: nats per token}; empty without data.
    """

    names: tuple[str, str]
    config: Mapping[str, tuple[str, str]]
    weights: Mapping[str, Mapping[str, float] | str]
    gates: Mapping[str, GatesApart | str]
    losses: Mapping[str, float]

    def tables(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """(title, header, rows) of each part; the first column of a table is text, the others of the config's too."""
        differing = [[name, *values] for name, values in self.config.items()]
        count = f"{len(differing) or 'no'} difference{'s' * (len(differing) > 1)}"
        yield f"config: {count}", ["", *self.names], differing
        roles = list(dict.fromkeys(r for found in self.weights.values() if not isinstance(found, str) for r in found))
        rows = []
        for module, found in self.weights.items():
            cells = [""] * len(roles) if isinstance(found, str) else [_number(found.get(role)) for role in roles]
            rows.append([module, *cells, found if isinstance(found, str) else ""])
        has_remarks = any(row[-1] for row in rows)
        header = ["module", *(f"cosine of {role}" for role in roles), *([""] if has_remarks else [])]
        yield "weights", header, rows if has_remarks else [row[:-1] for row in rows]
        if self.gates:
            rows = [
                [router, "", "", found]
                if isinstance(found, str)
                else [router, f"{found.distance:.3f}", f"{found.same_first:.0%}", ""]
                for router, found in self.gates.items()
            ]
            has_remarks = any(row[-1] for row in rows)
            header = ["router", "gates differ by", "same first expert", *([""] if has_remarks else [])]
            yield "gates on the text", header, rows if has_remarks else [row[:-1] for row in rows]
        if self.losses:
            yield "loss", ["", "nats per token"], [[name, f"{loss:.4f}"] for name, loss in self.losses.items()]

    def __rich__(self) -> Group:
        made = []
        for title, header, rows in self.tables():
            table = Table(title=title, title_justify="left")
            for number, name in enumerate(header):
                table.add_column(
                    Text(printable(name)), justify="left" if number == 0 or title.startswith("config") else "right"
                )
            for row in rows:
                table.add_row(*(Text(printable(cell)) for cell in row))
            made.append(table)
        return Group(*made)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100)
        console.print(self)
        return str(console.file.getvalue()).rstrip()  # type: ignore[attr-defined]

    __repr__ = __str__  # numbers of hundreds of modules in a line are for nobody

    def _repr_html_(self) -> str:
        return "".join(html_table(*table) for table in self.tables())


def compare(
    a: Source,
    b: Source,
    *,
    model: nnx.Module | None = None,
    tokenizer: Any = None,
    text: str | None = None,
    data: TokenData | None = None,
    pad_id: int = 0,
) -> Comparison:
    """Compares two adapters.

    Example:
        >>> mlj.compare("out", "again", model=base, tokenizer=tokenizer, text="what is two plus two")

    Args:
        a: a model with an adapter, an `moe_lora_interop.Adapter`, or a directory in any readable layout.
        b: the other one.
        model: the base model without an adapter; adapters that are not on a model are put on it in turn, and taken off
            again. Needed for them with `text` or `data`.
        tokenizer: of the base model; needed with `text`.
        text: compare the gates of its tokens.
        data: from `read_data`: compare the mean loss of its tokens, with that of `model` if it is given.
        pad_id: the token that padding is made of; it is masked.

    Raises:
        CheckpointError: an adapter cannot be read, or is not for `model`.
        ConfigError: something is missing that was asked for; or no router reads the text.
    """
    runs = text is not None or data is not None
    problems = []
    if runs and model is None and not (isinstance(a, nnx.Module) and isinstance(b, nnx.Module)):
        problems.append("model: found None, expected the base model, on which the adapters can be run")
    if model is not None and has_adapter(model):
        problems.append("model: found a model with an adapter, expected the base model without one")
    if text is not None and tokenizer is None:
        problems.append("tokenizer: found None, expected the one that makes tokens of the text")
    if problems:
        raise ConfigError("cannot compare", problems)
    names = names_of(a, b)
    adapters = [source if isinstance(source, Adapter) else _read(source) for source in (a, b)]
    gates: list[TextGates] = []
    losses: dict[str, float] = {}
    if data is not None and model is not None:
        losses["base model"] = evaluate(model, data, pad_id=pad_id)
    for name, source, adapter in zip(names, (a, b), adapters, strict=True):
        if runs:
            with carrying(source, model, adapter) as running:
                if text is not None:
                    gates.append(text_gates(running, tokenizer, text))
                if data is not None:
                    losses[name] = evaluate(running, data, pad_id=pad_id)
    settings = [{} if isinstance(s, nnx.Module | Adapter) else read_settings(s) for s in (a, b)]
    return comparison(names, adapters, settings, gates, losses)


def comparison(
    names: tuple[str, str],
    adapters: Sequence[Adapter],
    settings: Sequence[Mapping[str, Any]],
    gates: Sequence[TextGates],
    losses: Mapping[str, float],
) -> Comparison:
    """The comparison, of what was found for each of the two: adapter, settings of its training, gates on one text."""
    first, second = adapters
    return Comparison(
        names=names,
        config=config_differences(first, second) | setting_differences(*settings),
        weights=weight_cosines(first, second),
        gates=gates_apart(*gates) if gates else {},
        losses=dict(losses),
    )


def config_differences(a: Adapter, b: Adapter) -> dict[str, tuple[str, str]]:
    """{field: its two values}, in words, of those that differ; the routing rule as a whole too."""
    found = {}
    routing = routing_in_words(a.config), routing_in_words(b.config)
    if routing[0] != routing[1]:
        found["routing"] = routing
    skipped = {*BOOKKEEPING, "target_modules"} - {"base_model_name_or_path"}
    for field in dataclasses.fields(MoeLoraConfig):
        values = getattr(a.config, field.name), getattr(b.config, field.name)
        if field.name not in skipped and values[0] != values[1]:
            found[field.name] = (in_words(values[0]), in_words(values[1]))
    if a.modules != b.modules:
        found["target_modules"] = (modules_in_words(a.modules), modules_in_words(b.modules))
    return found


def setting_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The same of the settings of two trainings; of one without records they are unknown."""
    if not a and not b:
        return {}
    names = [name for name in {**a, **b} if (a.get(name), name in a) != (b.get(name), name in b)]
    return {
        f"training: {name}": (
            in_words(a[name]) if name in a else "not recorded",
            in_words(b[name]) if name in b else "not recorded",
        )
        for name in names
    }


def weight_cosines(a: Adapter, b: Adapter) -> dict[str, Mapping[str, float] | str]:
    """{module: {tensor: cosine}}: <x, y> / (|x| |y|) over all numbers of a tensor, all experts together.

    Where the sizes differ there is the reason instead: experts of other ranks are not comparable number by number.
    """
    found: dict[str, Mapping[str, float] | str] = {}
    for module in _ordered({module for adapter in (a, b) for module, _ in adapter.tensors}):
        mine, theirs = ({role: t for (m, role), t in x.tensors.items() if m == module} for x in (a, b))
        if reason := _not_comparable(a, b, module, mine, theirs):
            found[module or MODEL] = reason
        else:
            found[module or MODEL] = {ROLES.get(r, r): _cosine(mine[r], theirs[r]) for r in sorted(mine)}
    return found


def gates_apart(a: TextGates, b: TextGates) -> dict[str, GatesApart | str]:
    """How far the gates of the routers are from each other on the tokens of one text."""
    found: dict[str, GatesApart | str] = {}
    for router in _ordered({*a.shares, *b.shares}):
        if router not in a.shares or router not in b.shares:
            found[router] = f"only in the {'first' if router in a.shares else 'second'}"
            continue
        g, h = (np.asarray(x.shares[router], np.float64) for x in (a, b))
        if g.shape != h.shape:
            found[router] = f"not comparable: found num_experts {g.shape[1]} and {h.shape[1]}"
        else:
            same = float((g.argmax(axis=1) == h.argmax(axis=1)).mean())
            found[router] = GatesApart(float(np.abs(g - h).sum(axis=1).mean() / 2), same)
    return found


@contextlib.contextmanager
def carrying(source: Any, model: Any, adapter: Adapter) -> Iterator[Any]:
    """The source, if it is a model; else the base model with the adapter, which is taken off again."""
    if isinstance(source, nnx.Module):
        yield source
    else:
        try:
            yield load_adapter(model, adapter)
        finally:
            if has_adapter(model):
                remove_moe_lora(model)


def names_of(a: Any, b: Any) -> tuple[str, str]:
    """What to call the two: their directories, as short as tells them apart."""
    if isinstance(a, nnx.Module | Adapter) or isinstance(b, nnx.Module | Adapter):
        return "first", "second"
    first, second = Path(a).absolute(), Path(b).absolute()
    return (first.name, second.name) if first.name != second.name else (str(a), str(b))


def modules_in_words(modules: Sequence[str]) -> str:
    """Projections with the number of layers that have them."""
    grid = by_projection(modules)
    counts = {name: 0 if None in layers else len(layers) for name, layers in grid.items()}
    return ", ".join(f"{name} of {n} layer{'s' * (n > 1)}" if n else name for name, n in counts.items())


def in_words(value: Any) -> str:
    """A config's or a setting's value in a cell; a long one is cut."""
    text = "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read(source: Any) -> Adapter:
    return to_adapter(source) if isinstance(source, nnx.Module) else read_with_base(source)


def _ordered(modules: set[str]) -> list[str]:
    return [module for layers in by_projection(modules).values() for module in layers.values()]


def _not_comparable(
    a: Adapter, b: Adapter, module: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]
) -> str | None:
    if not mine or not theirs:
        return f"only in the {'first' if mine else 'second'}"
    sizes = [x.config.for_module(module) for x in (a, b)]
    ranks = [s.ranks[0] if len(set(s.ranks)) == 1 else list(s.ranks) for s in sizes]
    problems = []
    if "lora_A" in mine and ranks[0] != ranks[1]:
        problems.append(f"r {ranks[0]} and {ranks[1]}")
    if sizes[0].num_experts != sizes[1].num_experts:
        problems.append(f"num_experts {sizes[0].num_experts} and {sizes[1].num_experts}")
    if not problems:  # what is left is rare: another base model, another kind of router
        problems = [
            f"{role} {_shape(mine.get(role))} and {_shape(theirs.get(role))}"
            for role in sorted({*mine, *theirs})
            if _shape(mine.get(role)) != _shape(theirs.get(role))
        ]
    return f"not comparable: found {', '.join(problems)}" if problems else None


def _shape(tensor: Any) -> str:
    return "none" if tensor is None else str(list(tensor.shape))


def _cosine(a: Any, b: Any) -> float:
    x, y = (np.asarray(t).astype(np.float64).ravel() for t in (a, b))
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norm) if norm > 0 else float("nan")


def _number(cosine: float | None) -> str:
    return "" if cosine is None else "one is zero" if np.isnan(cosine) else f"{cosine:.3f}"
