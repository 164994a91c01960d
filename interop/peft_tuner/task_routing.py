"""Task ids at call time: PEFT drops an argument `task_ids` on its way to the model, so they come by a context."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from interop.peft_tuner.model_router import ModelRouter
from interop.peft_tuner.task_ids import TaskIds


@contextmanager
def task_routing(model: nn.Module, task_ids: Any) -> Iterator[None]:
    """Every forward inside routes by these ids; contexts nest.

        with peft_model.base_model.task_routing(task_ids):
            peft_model.generate(**batch)

    Args:
        model: the PeftModel, or the model into which the adapter was injected.
        task_ids: int [batch]; or int [batch, n], for the mean of the embeddings of the ids > 0 (MOELoRA's rule). The
            batch of a forward may be a multiple of theirs (in beam search, the beams of a sample follow one another).

    Raises:
        ValueError: the ids are no integers of such a shape, or no adapter of the model routes by task. An id that is
            not in an adapter's table, or a batch of another size, is refused by the forward.
    """
    ids = TaskIds(task_ids)
    routers = [m for m in model.modules() if isinstance(m, ModelRouter) and m.reads_tasks]
    if not routers:
        raise ValueError("task_routing: no MOE_LORA adapter of this model routes by task (router_input: task)")
    before = [router.task_ids for router in routers]
    for router in routers:
        router.task_ids = ids
    try:
        yield
    finally:
        for router, previous in zip(routers, before, strict=True):
            router.task_ids = previous
