"""Models run over data, outside a training step: their loss, or whatever else is asked of every batch."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from moe_lora_jax.models.stacked import unstack_layers
from moe_lora_jax.sharding import mesh_of, put_rows, replicated
from moe_lora_jax.train.batches import eval_batches
from moe_lora_jax.train.chunked_loss import model_loss
from moe_lora_jax.train.data import TokenData, check_vocabulary
from moe_lora_jax.train.losses import TokenLoss
from moe_lora_jax.train.step import Batch


def evaluate(model: nnx.Module, data: TokenData, *, batch_size: int = 8, pad_id: int = 0) -> float:
    """Mean next-token loss over the counted tokens of `data`, in nats. Without dropout; the model is not changed.

    Args:
        model: with or without an adapter, called as `CausalLM` is.
        data: from `read_data`.
        batch_size: rows of one forward pass.
        pad_id: the token that padding is made of; it is masked.

    Raises:
        DataError: token ids that the model has no row for.
    """
    check_vocabulary(data, model)
    return mean_loss(*split_for_evaluation(model), data, batch_size=batch_size, pad_id=pad_id)[0]


def mean_loss(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    data: TokenData,
    *,
    batch_size: int,
    pad_id: int,
    loss_chunk: int | None = None,
) -> tuple[float, int]:
    """`evaluate` for a model that is split already; also returns the number of counted tokens.

    `loss_chunk` is that of `make_train_step`.
    """
    nll, counted = 0.0, 0.0
    hosts = eval_batches(data.examples, batch_size=batch_size, pad_id=pad_id)
    batches = (host.batch for host in hosts)
    for mean, tokens in run_batches(batch_loss, graphdef, states, batches, arguments=(loss_chunk,)):
        nll, counted = nll + float(mean) * float(tokens), counted + float(tokens)
    return nll / counted, int(counted)


def batch_loss(model: Any, batch: Batch, loss_chunk: int | None = None) -> TokenLoss:
    """The next-token loss of one batch."""
    return model_loss(model, batch.input_ids, batch.loss_mask, batch.arguments(), chunk=loss_chunk)[0]


def split_for_evaluation(model: Any) -> tuple[nnx.GraphDef, tuple[nnx.State, ...]]:
    """What `run_batches` takes: the model without dropout, split. Several models may come as one tuple."""
    graphdef, state = nnx.split(nnx.with_attributes(model, deterministic=True, raise_if_not_found=False))
    return graphdef, (state,)


def run_batches(
    compute: Callable[..., Any],
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    batches: Iterable[Batch],
    *,
    arguments: tuple[Any, ...] = (),
) -> Iterator[Any]:
    """Yields compute(model, batch, *arguments) of every batch, on the host; to sum up is the caller's part.

    The program is compiled once for a function, a graph and a shape. On a mesh the rows of a batch are spread over it,
    and what is computed is whole on every device.

    Args:
        compute: from the model and a batch to a pytree of arrays; jitted.
        graphdef: of the model, in evaluation mode.
        states: all of its states; the layers may be stacked (`models.stacked`).
        batches: of arrays [batch, seq].
        arguments: that are part of the program: hashable.
    """
    mesh = mesh_of(states)
    static: dict[str, Any] = {"compute": compute, "arguments": arguments, "graphdef": graphdef, "mesh": mesh}
    for batch in batches:
        yield jax.device_get(_run(states, put_rows(batch, mesh), **static))


@partial(jax.jit, static_argnames=("compute", "arguments", "graphdef", "mesh"))
def _run(
    states: tuple[nnx.State, ...],
    batch: Batch,
    *,
    compute: Callable[..., Any],
    arguments: tuple[Any, ...],
    graphdef: nnx.GraphDef,
    mesh: Mesh | None,
) -> Any:
    model = nnx.merge(graphdef, *unstack_layers(states), copy=True)
    computed = compute(model, batch, *arguments)
    return computed if mesh is None else jax.lax.with_sharding_constraint(computed, replicated(mesh))
