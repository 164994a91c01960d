"""The router of a whole model: an MLP on its last hidden state (X-LoRA) or on a task embedding (MOELoRA)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora_interop.peft_tuner.first_pass import batch_size, call_arguments, last_hidden_state
from moe_lora_interop.peft_tuner.refusals import CACHE_REFUSAL, FIRST_PASS_REFUSAL, TASKS_MISSING
from moe_lora_interop.peft_tuner.shared_router import SharedRouter


class ModelRouter(SharedRouter):
    """Runs before the model's forward and leaves gates to the model's layers, or, in scope linear, the task ids.

    h is the last hidden state (after the final norm) of a first pass without gradient and without the adapters of this
    method, or with every gate scaling_pass_value (arXiv:2402.07148); or a row of the task table, without such a pass.

    Gates stay until the next forward, as gradient checkpointing (non-reentrant) runs the layers again in the backward
    pass: with it, the backward pass of one forward has to come before the next forward with gradient. A forward
    without gradient puts the former gates back, so that evaluating in between is harmless.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner)
        self.task_ids: TaskIds | None = None
        self.before: dict[str, Any] = {}
        self.handles.append(owner.register_forward_pre_hook(self.before_model, with_kwargs=True))
        self.handles.append(owner.register_forward_hook(self.after_model))

    @property
    def reads_tasks(self) -> bool:
        """Whether any adapter routes by task."""
        return any(config.router_input == "task" for config in self.moe_lora_config.values())

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Routes.

        Raises:
            ValueError: task ids that are missing or do not fit; a cache with a router that needs a first pass; another
                active adapter, where the first pass is with this one.
        """
        names = self.active_mixtures()
        if not names:
            return
        self.moe_lora_routing = {}
        self.before = {name: shared.value for name, shared in self.moe_lora_shared.items()}
        arguments = call_arguments(model, args, kwargs)
        hidden: Tensor | None = None
        for name in names:
            if self.moe_lora_config[name].router_input == "task":
                self.moe_lora_shared[name].value = self._from_tasks(name, arguments)
                continue
            if arguments.get("past_key_values") is not None or arguments.get("cache") is not None:
                raise ValueError(CACHE_REFUSAL.format(name=name))
            first = self.router_parameters(name)[0]
            if first.is_meta:
                self.require_values(name)
            if hidden is None:
                self.moe_lora_shared[name].value = self._first_gates(name)
                with_adapter = self.moe_lora_shared[name].value is not None
                hidden = last_hidden_state(model, arguments, with_adapters=with_adapter)
            x = hidden.reshape(-1, hidden.shape[-1]).to(first.device)
            self.moe_lora_shared[name].value = self.weights(name, self.route(name, x).gates)

    def _first_gates(self, adapter_name: str) -> Tensor | None:
        """The gates of one row in the first pass; None if the adapter takes no part in it."""
        config = self.moe_lora_config[adapter_name]
        if not config.scaling_pass_value:
            return None
        if len(self.active_adapters) > 1:
            raise ValueError(FIRST_PASS_REFUSAL.format(name=adapter_name, value=config.scaling_pass_value))
        logits = self.router_parameters(adapter_name)[-1].shape[0]  # of the last layer's weight or bias
        gates = torch.full((1, logits), config.scaling_pass_value * config.routed_scaling_factor)
        several = config.n_splits > 1 or config.layerwise
        return gates.unflatten(-1, (-1, config.num_experts)) if several else gates

    def _from_tasks(self, adapter_name: str, arguments: dict[str, Any]) -> Tensor:
        config = self.moe_lora_config[adapter_name]
        if self.task_ids is None:
            raise ValueError(TASKS_MISSING.format(name=adapter_name))
        ids = self.task_ids.for_batch(batch_size(arguments), config.num_tasks or 0)
        if config.scope == "linear":
            return ids
        return self.weights(adapter_name, self.route_tasks(adapter_name, ids).gates)

    def after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Without gradient, no backward pass will need this forward's gates."""
        if not torch.is_grad_enabled() and self.active_mixtures():
            for name, value in self.before.items():
                self.moe_lora_shared[name].value = value
        self.before = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "before": {}, "task_ids": None}


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
            found = f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
            raise ValueError(f"task_ids: found {found}, expected integers [batch] or [batch, n]")
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
            raise ValueError(f"task_ids: found {len(self.ids)} for a batch of {batch}, expected one for each sample")
        return self.ids


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
