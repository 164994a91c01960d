"""The loss of a model on data, outside a training run."""

from functools import partial

import jax
from flax import nnx
from jax.sharding import Mesh

from moe_lora_jax.sharding import mesh_of, put_rows, replicated
from moe_lora_jax.train.batches import eval_batches
from moe_lora_jax.train.data import TokenData, check_vocabulary
from moe_lora_jax.train.losses import next_token_loss
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
    graphdef, state = nnx.split(nnx.with_attributes(model, deterministic=True, raise_if_not_found=False))
    nll, counted, mesh = 0.0, 0.0, mesh_of(state)
    for host in eval_batches(data.examples, batch_size=batch_size, pad_id=pad_id):
        mean, tokens = _loss(state, put_rows(host.batch, mesh), graphdef=graphdef, mesh=mesh)
        nll, counted = nll + float(mean) * float(tokens), counted + float(tokens)
    return nll / counted


@partial(jax.jit, static_argnames=("graphdef", "mesh"))
def _loss(state: nnx.State, batch: Batch, *, graphdef: nnx.GraphDef, mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, state, copy=True)
    logits = model(batch.input_ids, attention_mask=batch.attention_mask)
    loss = next_token_loss(logits, batch.input_ids, batch.loss_mask)
    return loss if mesh is None else jax.lax.with_sharding_constraint(loss, replicated(mesh))
