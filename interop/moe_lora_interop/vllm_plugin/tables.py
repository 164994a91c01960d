"""The tables of one layer: which rule every slot has, and which expert every column of the rank axis belongs to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lora_interop.checkpoint.servable import MAX_EXPERTS
from moe_lora_interop.vllm_plugin.gates import gates
from moe_lora_interop.vllm_plugin.rules import FIELDS, Rule


@dataclass(frozen=True)
class Gating:
    """What the tables hold of one module of an adapter; the default is that of a plain LoRA, and of none.

    Attributes:
        rule: how the gates are made.
        bias: the router's, of every expert.
        ranks: columns of every expert, from the first column on.
    """

    rule: Rule = field(default_factory=Rule)
    bias: tuple[float, ...] = ()
    ranks: tuple[int, ...] = ()


class Tables(NamedTuple):
    """Allocated once for a layer, updated in place.

    rules   [slice, slot, field and unit], fp32
    owners  [slice, slot, column]: the expert of each column; `units` for columns of none
    parts   columns for each unit

    The last slot is that of tokens without an adapter. The units stand at the end of the rank axis, the first one last:
    unit u has columns rank - (u + 1) * parts to rank - u * parts, whatever the adapter. So every token's logits are the
    same columns, and only they are summed over the processes of a layer that is split along its input.
    """

    rules: Tensor
    owners: Tensor
    parts: int

    @classmethod
    def empty(cls, slices: int, slots: int, rank: int, parts: int, device: torch.device | str = "cpu") -> "Tables":
        """Those of a layer for `slots` adapters of up to `rank` columns."""
        units = units_of(rank, parts)
        rules = torch.zeros(slices, slots + 1, len(FIELDS) + units, dtype=torch.float32, device=device)
        owners = torch.zeros(slices, slots + 1, rank, dtype=torch.long, device=device)
        tables = cls(rules, owners, parts)
        for slot in range(slots + 1):
            tables.fill(slot, [Gating()] * slices)
        return tables

    @property
    def units(self) -> int:
        """Experts of the largest mixture that fits."""
        return self.rules.shape[-1] - len(FIELDS)

    def fill(self, slot: int, gatings: Sequence[Gating]) -> None:
        """Gives a slot the adapter whose modules these are, one for each slice."""
        for index, gating in enumerate(gatings):
            row = gating.rule.row(gating.bias, self.units)
            columns = [expert for expert, rank in enumerate(gating.ranks) for _ in range(rank)]
            columns += [self.units] * (self.owners.shape[-1] - len(columns))
            self.rules[index, slot].copy_(torch.tensor(row))
            self.owners[index, slot].copy_(torch.tensor(columns))


def units_of(rank: int, parts: int) -> int:
    """Logits of the largest mixture that fits into this rank: each of its experts has a column, too."""
    return max(1, min(MAX_EXPERTS, (rank + 1) // (1 + parts)))


def gated(codes: Tensor, slots: Tensor, tables: Tables, over_processes: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Multiplies A x by the gates that its last columns imply; where nothing has a gate, by exactly 1.

    Args:
        codes: A x, fp32 [slice, token, column].
        slots: of every token; any number that is no slot stands for no adapter.
        tables: the layer's.
        over_processes: sums a tensor over the processes, if each has only a part of x.

    Returns:
        [slice, token, column].
    """
    none = tables.rules.shape[1] - 1
    slots = torch.where((slots >= 0) & (slots < none), slots, none)
    units = codes[..., codes.shape[-1] - tables.units * tables.parts :]
    units = units.unflatten(-1, (tables.units, tables.parts)).sum(-1).flip(-1)
    if over_processes is not None:
        units = over_processes(units)
    weights = torch.nn.functional.pad(gates(units, tables.rules[:, slots]), (0, 1), value=1.0)
    return codes * weights.gather(-1, tables.owners[:, slots])
