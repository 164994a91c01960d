"""The tables of one layer: which rule every slot has, and which expert every column of the rank axis belongs to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


class Tables:
    """Allocated once for a layer, updated in place.

    rules   [slice, slot, field and unit], fp32
    owners  [slice, slot, column]: the expert of each column; `units` for columns of none
    units   experts of the largest mixture that fits
    rows    columns for each unit

    The last slot is that of tokens without an adapter. The units stand at the end of the rank axis, the first one last:
    unit u has columns rank - (u + 1) * rows to rank - u * rows, whatever the adapter. So every token's logits are the
    same columns, and only they are summed over the processes of a layer that is split along its input.

    Args:
        slices: layers that vLLM has fused into this one.
        slots: adapters on the device at once.
        rank: columns.
        rows: columns for each unit.
        device: of the tables.
    """

    def __init__(self, slices: int, slots: int, rank: int, rows: int, device: torch.device | str = "cpu") -> None:
        self.units, self.rows = units_of(rank, rows), rows
        self.rules = torch.zeros(slices, slots + 1, len(FIELDS) + self.units, dtype=torch.float32, device=device)
        self.owners = torch.zeros(slices, slots + 1, rank, dtype=torch.long, device=device)
        self._loaded: dict[int, list[Rule]] = {}
        for slot in range(slots + 1):
            self.fill(slot, [Gating()] * slices)

    def fill(self, slot: int, gatings: Sequence[Gating]) -> None:
        """Gives a slot the adapter whose modules these are, one for each slice."""
        self._loaded[slot] = [gating.rule for gating in gatings]
        for index, gating in enumerate(gatings):
            columns = [expert for expert, rank in enumerate(gating.ranks) for _ in range(rank)]
            columns += [self.units] * (self.owners.shape[-1] - len(columns))
            self.rules[index, slot].copy_(torch.tensor(gating.rule.row(gating.bias, self.units)))
            self.owners[index, slot].copy_(torch.tensor(columns))

    def units_in(self, slot: int) -> int:
        """Units that the adapter in this slot has; 0 for a plain LoRA, and for a number that is no slot."""
        return max(int(rule.experts + rule.adaptive) for rule in self._loaded.get(slot, [Rule()]))

    def parts_in(self, slot: int) -> frozenset[str]:
        """Parts of the formula that it needs."""
        return frozenset().union(*(rule.parts for rule in self._loaded[slot]))


def units_of(rank: int, rows: int) -> int:
    """Logits of the largest mixture that fits into this rank: each of its experts has a column, too."""
    return max(1, min(MAX_EXPERTS, (rank + 1) // (1 + rows)))


def gated(
    codes: Tensor, slots: Tensor, tables: Tables, over_processes: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Multiplies A x by the gates that its last columns imply; where nothing has a gate, by exactly 1.

    Nothing depends on what is loaded, so it can be compiled and captured.

    Args:
        codes: A x, fp32 [slice, token, column].
        slots: of every token; any number that is no slot stands for no adapter.
        tables: the layer's.
        over_processes: sums a tensor over processes, if each has only a part of x.

    Returns:
        [slice, token, column].
    """
    slots = slots.clamp(-1, tables.rules.shape[1] - 1)  # -1 is the last
    units = _units(codes, tables.units, tables.rows)
    if over_processes is not None:
        units = over_processes(units)
    return codes * _by_column(gates(units, tables.rules[:, slots]), tables.owners[:, slots], tables.units)


def gated_by_adapter(codes: Tensor, slots: Tensor, tables: Tables) -> Tensor:
    """`gated` in place, one adapter after the other: for a CPU, where nothing is captured and every operation counts.

    Base and plain LoRAs cost nothing, and a mixture only the parts of the formula that it needs. Not for a layer that
    is split along its input: how often processes meet must not depend on what is in a batch.
    """
    present = slots.unique().tolist()
    for slot in present:
        if number := tables.units_in(slot):
            tokens = slice(None) if len(present) == 1 else (slots == slot).nonzero()[:, 0]
            mine = codes[:, tokens]
            weights = gates(_units(mine, number, tables.rows), tables.rules[:, slot, None], tables.parts_in(slot))
            owners = tables.owners[:, slot, None].expand(-1, mine.shape[1], -1)
            mine *= _by_column(weights, owners, tables.units)
            if len(present) > 1:
                codes[:, tokens] = mine
    return codes


def _units(codes: Tensor, number: int, rows: int) -> Tensor:
    """The router's outputs, without bias: [..., unit]."""
    tail = codes[..., codes.shape[-1] - number * rows :]
    return (tail if rows == 1 else tail.unflatten(-1, (number, rows)).sum(-1)).flip(-1)


def _by_column(weights: Tensor, owners: Tensor, none: int) -> Tensor:
    """For each column the weight of its expert, or 1 where that is `none`."""
    return torch.nn.functional.pad(weights, (0, none + 1 - weights.shape[-1]), value=1.0).gather(-1, owners)
