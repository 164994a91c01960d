"""The task ids of a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor


class TaskIds:
    """Checked task ids.

    Args:
        task_ids: integers [batch] or [batch, n], as a tensor, an array or lists.

    Raises:
        ValueError: they are not.
    """

    def __init__(self, task_ids: Tensor | Sequence[int] | Sequence[Sequence[int]]):
        ids = torch.as_tensor(task_ids)
        if ids.ndim not in (1, 2) or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"task_ids must be integers [batch] or [batch, n], got {ids.dtype} {list(ids.shape)}")
        self.ids = ids.long()
        self.values = sorted(set(self.ids.flatten().tolist()))

    def for_batch(self, batch: int, num_tasks: int) -> Tensor:
        """The ids for a forward of `batch` rows.

        Raises:
            ValueError: the batch is no multiple of the ids' (beam search repeats every row), or there is an id that a
                table of `num_tasks` does not have.
        """
        # a compiled graph would be specialised to the values; there, torch's own check of indices remains
        wrong = [] if torch.compiler.is_compiling() else [i for i in self.values if not 0 <= i < num_tasks]
        if wrong:
            raise ValueError(f"task_ids: found {', '.join(map(str, wrong))}, expected ids from 0 to {num_tasks - 1}")
        if batch % len(self.ids):
            raise ValueError(f"task_ids has {len(self.ids)} rows, the batch has {batch}: expected one for each sample")
        return self.ids
