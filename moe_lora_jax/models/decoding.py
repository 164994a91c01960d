"""Text generation: prefill and decoding in one compiled program."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moe_lora_jax.models.cache import KVCache
from moe_lora_jax.models.sampling import Sampling, choose
from moe_lora_jax.models.vocabulary import check_ids, given_ids
from moe_lora_jax.sharding import mesh_of, put_rest, replicated

# Room for ending ids, so that another number of them does not compile another program.
_EOS_SLOTS = 8


def generate(
    model: Any,
    input_ids: jax.Array,
    attention_mask: jax.Array | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    key: jax.Array | None = None,
    task_ids: jax.Array | None = None,
) -> jax.Array:
    """Continue each prompt: int32 [batch, seq + max_new_tokens], prompts included.

    On a mesh of several processes all of them call this with the same arguments and get the same tokens.

    The first call with given shapes compiles; temperature, top_p, ending ids, weights and prompts can then change
    freely. The model runs in evaluation mode (no dropout) and is not changed. Decoding stops once every row has ended.

    Prompts may be padded on either side. New tokens always follow in column `seq`; after a right-padded prompt they
    continue the positions of its real tokens, so the result equals that of the prompt without padding.

    Args:
        model: has `config`, `hidden_states` and `head` like `CausalLM`, with or without adapters.
        input_ids: integers [batch, seq].
        attention_mask: [batch, seq], non-zero for real tokens; None if all are real.
        max_new_tokens: at least 1.
        temperature: 0 takes the most likely token; above 0, tokens are drawn from softmax(logits / temperature).
        top_k: restricts the draw, see `sampling.choose`.
        top_p: likewise.
        eos_token_id: ids that end a row; None takes the model's, an empty sequence none.
        pad_token_id: fills ended rows; None takes the model's, or else the first ending id.
        task_ids: integers [batch] or [batch, n], for an adapter that routes by task.
        key: `jax.random.key`, required when drawing; the same key gives the same tokens.

    Raises:
        ValueError: an argument out of its range, no key to draw with, a row without real tokens, or a token id outside
            the vocabulary.
    """
    ids = given_ids(input_ids)
    mask = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) != 0
    _check(ids, mask, max_new_tokens, temperature, top_k, top_p, key)
    check_ids(model, ids, mask)
    ids = jnp.asarray(ids, jnp.int32)
    if eos_token_id is None:
        eos = model.config.eos_token_id
    else:
        eos = (eos_token_id,) if isinstance(eos_token_id, int | np.integer) else tuple(eos_token_id)
    pad = next((i for i in (pad_token_id, model.config.pad_token_id, *eos) if i is not None), 0)
    greedy = temperature == 0
    sampling = Sampling(greedy=greedy, top_k=None if greedy else top_k, nucleus=not greedy and top_p is not None)
    graphdef, state = nnx.split(model)
    inputs: Any = (
        ids,
        mask,
        jnp.asarray([*eos, *[-1] * (_EOS_SLOTS - len(eos))], jnp.int32),
        jnp.int32(pad),
        (jnp.float32(temperature), jnp.float32(1.0 if top_p is None else top_p)),
        jax.random.key(0) if key is None else key,  # greedy choice ignores it
        {} if task_ids is None else {"task_ids": jnp.asarray(task_ids)},
    )
    mesh = mesh_of(state)
    if mesh is not None:
        inputs = put_rest(inputs, mesh)
    new = _generate(state, *inputs, graphdef=graphdef, steps=max_new_tokens, sampling=sampling, mesh=mesh)
    return jnp.concatenate([inputs[0], new], axis=1)


class _Decoding(NamedTuple):
    """The loop's state: the next step, the last tokens [batch], all new ones [batch, steps], which rows have ended."""

    step: jax.Array
    token: jax.Array
    tokens: jax.Array
    ended: jax.Array
    cache: KVCache


@partial(jax.jit, static_argnames=("graphdef", "steps", "sampling", "mesh"))
def _generate(
    state: nnx.State,
    ids: jax.Array,
    mask: jax.Array,
    eos: jax.Array,
    pad: jax.Array,
    settings: tuple[jax.Array, jax.Array],
    key: jax.Array,
    routing: dict[str, jax.Array],
    *,
    graphdef: nnx.GraphDef,
    steps: int,
    sampling: Sampling,
    mesh: Mesh | None,
) -> jax.Array:
    """New tokens, int32 [batch, steps]. The weights are an argument, so that other weights reuse the program."""
    batch, length = ids.shape

    def evaluating() -> Any:
        """The model in evaluation mode; made where it is used, because it cannot change across trace levels."""
        model = nnx.merge(graphdef, state, copy=True)
        model.eval()
        return model

    def choose_next(logits: jax.Array, step: jax.Array | int) -> jax.Array:
        return choose(logits, sampling, *settings, jax.random.fold_in(key, step))

    def unfinished(now: _Decoding) -> jax.Array:
        return (now.step < steps) & ~jnp.all(now.ended)

    def decode(now: _Decoding) -> _Decoding:
        model = evaluating()
        hidden, cache = model.hidden_states(now.token[:, None], cache=now.cache, **routing)
        token = jnp.where(now.ended, pad, choose_next(model.head(hidden[:, 0]), now.step))
        return _Decoding(
            step=now.step + 1,
            token=token,
            tokens=now.tokens.at[:, now.step].set(token),
            ended=now.ended | jnp.isin(token, eos),
            cache=cache,
        )

    model = evaluating()
    # The last new token is never read back, so it needs no slot.
    cache = model.empty_cache(batch, length + steps - 1)
    hidden, cache = model.hidden_states(ids, mask, cache=cache, **routing)
    last = length - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    first = choose_next(model.head(hidden[jnp.arange(batch), last]), 0)
    start = _Decoding(
        step=jnp.int32(1),
        token=first,
        tokens=jnp.full((batch, steps), pad).at[:, 0].set(first),
        ended=jnp.isin(first, eos),
        cache=cache,
    )
    tokens = jax.lax.while_loop(unfinished, decode, start).tokens
    return tokens if mesh is None else jax.lax.with_sharding_constraint(tokens, replicated(mesh))


def _check(
    ids: jax.Array,
    mask: jax.Array,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    key: jax.Array | None,
) -> None:
    """Refuses arguments that would run and mean nothing, all in one error."""
    problems = []
    if ids.ndim != 2 or ids.shape[1] == 0:
        problems.append(f"input_ids: found shape {ids.shape}, expected [batch, seq] with seq at least 1")
    elif mask.shape != ids.shape:
        problems.append(f"attention_mask: found shape {mask.shape}, expected that of input_ids, {ids.shape}")
    elif (empty := np.flatnonzero(~np.asarray(mask).any(axis=1))).size:
        problems.append(f"attention_mask: found no real token in rows {empty.tolist()}, expected one in every row")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens: found {max_new_tokens}, expected at least 1")
    if not temperature >= 0:
        problems.append(f"temperature: found {temperature}, expected 0 (greedy) or above")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k: found {top_k}, expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        problems.append(f"top_p: found {top_p}, expected above 0 and at most 1")
    if temperature > 0 and key is None:
        problems.append("key: found None, expected jax.random.key(seed): a temperature above 0 draws tokens")
    if problems:
        raise ValueError("; ".join(problems))
