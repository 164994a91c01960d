"""A mixture as the plain LoRA that vLLM multiplies with, and the gates that stand between its two products.

    A   [column, in]    the rows of every expert; zeros; the router's rows, unit 0 last (`tables.Tables`)
    B   [out, column]   s_e B_e side by side; zeros

so that A x has every expert's code and every logit, and B (gates * A x) is the mixture's delta.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.checkpoint.servable import PARTS, lora_rank, problems, rows
from moe_lora_interop.config.adapter_config import ModuleConfig
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.vllm_plugin.rules import Rule
from moe_lora_interop.vllm_plugin.tables import Gating


class Stacked(NamedTuple):
    """One module: A [column, in], B [out, column], and its gates."""

    a: Tensor
    b: Tensor
    gating: Gating


def rows_of(dtype: torch.dtype) -> int:
    """Rows in which a LoRA of this dtype holds one row of a router: float32 is the sum of three bfloat16."""
    return 1 if dtype == torch.float32 else PARTS


def stacked(adapter: Adapter, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Stacked]]:
    """(module, what vLLM multiplies with), one at a time.

    Args:
        adapter: the mixture.
        rank: columns; vLLM's --max-lora-rank.
        dtype: of A and B.

    Raises:
        CheckpointError: vLLM cannot serve it, or not with this rank; with what to do instead.
    """
    config, per_unit = adapter.config, rows_of(dtype)
    found = problems(config, adapter.modules, per_unit)
    if not found and (needed := rows(config, adapter.modules, per_unit)) > rank:
        least = lora_rank(config, adapter.modules, per_unit)
        found = [f"--max-lora-rank: found {rank}, expected {least}: {needed} rows of all experts and routers"]
    if found:
        raise CheckpointError("vLLM cannot serve this adapter", found)
    for module, sizes in config.for_modules(adapter.modules).items():
        yield module, _stacked(adapter, module, sizes, rank, dtype)


def _stacked(adapter: Adapter, module: str, sizes: ModuleConfig, rank: int, dtype: torch.dtype) -> Stacked:
    lora_a, lora_b = (_tensor(adapter, module, role) for role in ("lora_A", "lora_B"))
    a = torch.zeros(rank, lora_a.shape[-1], dtype=dtype)
    b = torch.zeros(lora_b.shape[1], rank, dtype=dtype)
    column = 0
    for expert, (own, scaling) in enumerate(zip(sizes.ranks, sizes.scalings, strict=True)):
        a[column : column + own] = lora_a[0 if sizes.shared_lora_A else expert, :own]
        b[:, column : column + own] = scaling * lora_b[expert, :, :own].float()
        column += own
    if not sizes.has_router:
        return Stacked(a, b, Gating())
    router, bias, threshold_bias = _tensor(adapter, module, "router"), (), 0.0
    if adapter.config.router_bias:
        bias = tuple(_tensor(adapter, module, "router_bias").tolist())
    if adapter.config.adaptive_threshold:
        router = torch.cat([router, _tensor(adapter, module, "threshold")[None]])
        threshold_bias = _tensor(adapter, module, "threshold_bias").item()
    parts = _in_parts(router, dtype).flip(0).flatten(0, 1)
    a[rank - len(parts) :] = parts
    return Stacked(a, b, Gating(Rule.of(adapter.config, sizes, threshold_bias), bias, sizes.ranks))


def _in_parts(router: Tensor, dtype: torch.dtype) -> Tensor:
    """[unit, part, in]: the parts of a row add up to it."""
    rest, parts = router.double(), []
    for _ in range(rows_of(dtype)):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].double()
    return torch.stack(parts, 1)


def _tensor(adapter: Adapter, module: str, role: str) -> Tensor:
    """In float32, which holds every dtype that a file has."""
    return torch.from_numpy(np.asarray(adapter.tensors[module, role]).astype(np.float32))
