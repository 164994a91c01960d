"""The parts of a router: stored in any dtype, computed in that of the input, which is at least fp32.

They are called as modules, not read, because a sharded one (FSDP) is whole only during its call.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RouterLinear(nn.Linear):
    """W x + b in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RouterTable(nn.Embedding):
    """Rows of the table in at least fp32: ids [...] -> [..., dim]."""

    def forward(self, ids: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return F.embedding(ids.to(self.weight.device), self.weight).to(dtype)
