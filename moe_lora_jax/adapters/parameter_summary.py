"""What an adapter adds to a model, as a table."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_lora_interop.config.in_words import routing_in_words
from moe_lora_interop.errors import CheckpointError
from moe_lora_jax.adapters.apply import adapted_names
from moe_lora_jax.adapters.projections import by_projection
from moe_lora_jax.layers.mixing import MoeLoraParam
from moe_lora_jax.models.quantized import Codes
from moe_lora_jax.tree import has_adapter

_HEADER = ("modules", "layers", "experts", "rank", "top_k", "parameters")


class Row(NamedTuple):
    """The modules of one projection; a range such as "2-8" where they differ, "" where there is no such number."""

    modules: str
    layers: int
    experts: str
    rank: str
    top_k: str
    parameters: int


@dataclass(frozen=True)
class Summary:
    """An adapter in numbers. Shows itself: as a table in rich, Jupyter and `print`.

    base: name of the base model, if known. routing: the rule in words. rows: one per projection, routers of blocks and
    of the model included. parameters, base_parameters: how many numbers the adapter and the base have.
    """

    base: str | None
    routing: str
    rows: tuple[Row, ...]
    parameters: int
    base_parameters: int

    @property
    def share(self) -> float:
        """Parameters of the adapter over those of the base."""
        return self.parameters / self.base_parameters

    @property
    def title(self) -> str:
        """One line."""
        return f"{self.parameters:,} adapter parameters, {self.share:.2%} of the {self.base_parameters:,} of the base"

    def __rich__(self) -> Table:
        table = Table(
            title=self.title,
            caption=Text(f"routing: {self.routing}", "table.caption"),
            title_justify="left",
            caption_justify="left",
        )
        for name in _HEADER:
            table.add_column(name, justify="left" if name == "modules" else "right")
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100)
        console.print(self)
        return str(console.file.getvalue()).rstrip()  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        head = "".join(f'<th scope="col">{name}</th>' for name in _HEADER)
        rows = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>" for cells in self._cells())
        caption = f"{escape(self.title)}. Routing: {escape(self.routing)}."
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def _cells(self) -> Iterator[list[str]]:
        for row in self.rows:
            yield [f"{cell:,}" if isinstance(cell, int) else cell for cell in row]


def summary(model: Any) -> Summary:
    """Which modules of `model` carry experts, how many, of what rank, and what share of the base that is.

    Raises:
        CheckpointError: the model has no adapter.
    """
    if not has_adapter(model):
        raise CheckpointError("the model has no adapter: call apply_moe_lora or load_adapter first")
    if not hasattr(model, "moe_lora_config"):
        raise CheckpointError("the model has an AdapterBank: summarise a model that carries one of its adapters")
    config, sizes = model.moe_lora_config, _sizes(model)
    targets = [m for m in sizes if m in config.target_modules]
    grid = by_projection(targets) | by_projection(m for m in sizes if m not in targets)
    rows = []
    for name, layers in grid.items():
        found = config.for_modules(layers.values())
        rows.append(
            Row(
                modules=name or "router of the model",
                layers=len(layers),
                experts=_range(s.num_experts for s in found.values()),
                rank=_range(r for m, s in found.items() if m in targets for r in s.ranks),
                top_k=_range(s.top_k or "all" for s in found.values() if s.has_router),
                parameters=sum(sizes[m] for m in layers.values()),
            )
        )
    base = nnx.state(model, nnx.Any(nnx.All(nnx.Param, nnx.Not(MoeLoraParam)), Codes))
    return Summary(
        base=config.base_model_name_or_path,
        routing=routing_in_words(config),
        rows=tuple(rows),
        parameters=sum(sizes.values()),
        base_parameters=sum(leaf.size for leaf in jax.tree.leaves(base)),
    )


def _sizes(model: nnx.Module) -> dict[str, int]:
    """{module, block with a router, or "" for the model's: parameters of the adapter there}."""
    names, sizes = adapted_names(model), dict[str, int]()
    for path, leaf in nnx.to_flat_state(nnx.state(model, MoeLoraParam)):
        parts = [str(part) for part in path if part != "base_layer"]
        end = next(i for i, part in enumerate(parts) if part in ("lora_a", "lora_b", "router", "moe_lora_router"))
        path_of_module = ".".join(parts[:end])
        module = names.get(path_of_module, path_of_module)
        sizes[module] = sizes.get(module, 0) + leaf.size
    return sizes


def _range(values: Iterable[Any]) -> str:
    found = sorted(set(values), key=lambda v: (isinstance(v, str), v))
    return "" if not found else str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"
