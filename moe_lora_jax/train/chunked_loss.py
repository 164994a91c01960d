"""A model's next-token loss, by chunks of its hidden states: the logits of all tokens never exist.

Those of 8,192 tokens over a vocabulary of 128,256 would take 3.9 GiB in fp32. So the head and the loss run over a few
tokens of every row at a time, and once more in the backward pass.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_lora_jax.layers.gating import RouterOutput
from moe_lora_jax.models import CausalLM
from moe_lora_jax.sharding import row_parts, row_sharding
from moe_lora_jax.train.losses import LOG_SUM_EXP, TokenLoss, next_token_loss, next_tokens, summed_loss

AT_ONCE = 256 * 2**20  # bytes of fp32 logits on a device
LEAST = 128  # tokens of a row: with fewer, reading the head would take longer than multiplying


def model_loss(
    model: Any,
    input_ids: jax.Array,
    loss_mask: jax.Array,
    arguments: Mapping[str, Any],
    *,
    chunk: int | None = None,
    return_router: bool = False,
) -> tuple[TokenLoss, dict[str, RouterOutput]]:
    """The next-token loss of a batch, and what the model's routers did.

    A `CausalLM` gives hidden states, and the loss is computed from them in chunks. Any other model, and one with an
    adapter at its head, is called for its logits.

    Args:
        input_ids: [batch, seq].
        loss_mask: [batch, seq], true for the tokens that are targets; see `next_token_loss`.
        arguments: what else the model is called with.
        chunk: tokens of a row. None: as many as have fp32 logits of at most 256 MiB on a device; all of a row, or else
            a power of two, at least 128.
        return_router: whether to ask a model that is called for its logits for its routers too; else they are {}.
    """
    scorer = model.scorer() if isinstance(model, CausalLM) else None
    if scorer is None:
        if not return_router:
            return next_token_loss(model(input_ids, **arguments), input_ids, loss_mask), {}
        logits, router = model(input_ids, **arguments, return_router=True)
        return next_token_loss(logits, input_ids, loss_mask), router
    hidden, router = model.with_router(model.hidden_states, input_ids, **arguments)
    mesh = model.model.mesh
    if chunk is None:
        chunk = _chunk(input_ids.shape, model.config.vocab_size, mesh)
    return loss_of_hidden(hidden, scorer, input_ids, loss_mask, chunk=chunk, mesh=mesh), router


def loss_of_hidden(
    hidden: jax.Array,
    scorer: Callable[[jax.Array], jax.Array],
    input_ids: jax.Array,
    loss_mask: jax.Array,
    *,
    chunk: int,
    mesh: Mesh | None = None,
) -> TokenLoss:
    """`next_token_loss` of scorer(hidden), up to rounding.

    Args:
        hidden: [batch, seq, hidden].
        scorer: from hidden states [..., hidden] to logits [..., vocab].
        chunk: tokens of a row whose logits exist at once; of the last chunk, which may be smaller, too.
        mesh: where rows stay on their devices.
    """
    targets, counted = next_tokens(input_ids, loss_mask)
    length = hidden.shape[1]

    def loss(hidden: jax.Array, targets: jax.Array, counted: jax.Array) -> jax.Array:
        return summed_loss(scorer(hidden), targets, counted)

    if chunk >= length:
        total = loss(hidden, targets, counted)
    else:
        number = -(-length // chunk)

        def parts(values: jax.Array) -> jax.Array:
            """[batch, seq, ...] -> [chunk, batch, token of the chunk, ...], filled up with tokens that do not count."""
            filled = jnp.pad(values, [(0, 0), (0, number * chunk - length)] + [(0, 0)] * (values.ndim - 2))
            cut = filled.reshape(values.shape[0], number, chunk, *values.shape[2:]).swapaxes(0, 1)
            if mesh is None or values.shape[0] % row_parts(mesh):
                return cut
            return jax.lax.with_sharding_constraint(cut, row_sharding(mesh, 1))

        def add(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            return total + again(*part), None

        policy = jax.checkpoint_policies.save_only_these_names(LOG_SUM_EXP)
        again = jax.checkpoint(loss, policy=policy, prevent_cse=False)
        total, _ = jax.lax.scan(add, jnp.zeros(()), (parts(hidden), parts(targets), parts(counted)))
    count = jnp.sum(counted)
    return TokenLoss(total / jnp.maximum(count, 1.0), count)


def _chunk(shape: tuple[int, ...], vocab_size: int, mesh: Mesh | None) -> int:
    """The automatic chunk, see `model_loss`."""
    batch, length = shape
    sizes = {} if mesh is None else dict(mesh.shape)
    parts = 1 if mesh is None or batch % row_parts(mesh) else row_parts(mesh)
    most = AT_ONCE // (batch // parts * (vocab_size // sizes.get("tensor", 1)) * 4)
    return length if length <= most else max(LEAST, 1 << max(most.bit_length() - 1, 0))
