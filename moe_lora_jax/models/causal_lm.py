"""The language model: a decoder and its output head."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_interop.config.modules import traversal_order
from moe_lora_jax.layers.linear_maps import linear_map
from moe_lora_jax.layers.model_router import ModelRouter
from moe_lora_jax.layers.router import RouterRecord
from moe_lora_jax.layers.router_outputs import router_outputs
from moe_lora_jax.models.cache import KVCache
from moe_lora_jax.models.config import DecoderConfig
from moe_lora_jax.models.decoder import Decoder
from moe_lora_jax.models.head import Matrix, matrix_of, product
from moe_lora_jax.models.masks import segment_runs
from moe_lora_jax.models.precision import in_its_precision
from moe_lora_jax.models.vocabulary import check_ids, given_ids
from moe_lora_jax.sharding import base_when_due

Cache = KVCache | tuple[KVCache, KVCache]


class CausalLM(nnx.Module):
    """A decoder-only language model with Hugging Face's module names.

    `model.embed_tokens`, `model.layers.{i}.self_attn.{q,k,v,o}_proj`, `model.layers.{i}.mlp.{gate,up,down}_proj`
    (`qkv_proj` and `gate_up_proj` where the family joins them), `model.norm`, and `lm_head` unless the embeddings are
    tied. Linears are `nnx.Linear` (kernel [in, out]) called on [tokens, features], so that they can be replaced in
    place.

    Example:
        >>> model = load_base_model("SmolLM2-135M")
        >>> logits = model(jnp.asarray([[1, 2, 3]]))            # [1, 3, vocab]

    Attributes:
        config: the `DecoderConfig`; `config.name_or_path` says where the weights came from.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Random weights; `load_base_model` reads stored ones without making these."""
        self.config = config
        self.model = Decoder(config, rngs=rngs)
        self.moe_lora_router: ModelRouter | None = nnx.data(None)  # set by apply_moe_lora
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, param_dtype=config.dtype, rngs=rngs
            )

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        task_ids: jax.Array | None = None,
        return_router: bool = False,
    ) -> Any:
        """Logits [batch, seq, vocab]; with a cache (logits, cache); with `return_router` one more value at the end.

        Args:
            return_router: also return {module path: RouterOutput}, fields [batch, seq, expert] ([batch, seq, split,
                expert] with splits). A router of the whole model is called "model", unless it is layerwise.

        Other arguments as in `hidden_states`.
        """
        arguments = {"cache": cache, "positions": positions, "segment_ids": segment_ids, "task_ids": task_ids}
        if not return_router:
            return self._logits(input_ids, attention_mask, **arguments)
        logits, router = self.with_router(self._logits, input_ids, attention_mask, **arguments)
        return (logits, router) if cache is None else (*logits, router)

    def with_router(self, method: Callable[..., Any], input_ids: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """What a method of this model returns, for example `hidden_states`, and its {module path: RouterOutput}."""
        returned, records = nnx.capture(method, RouterRecord)(input_ids, *args, **kwargs)
        return returned, router_outputs(records, getattr(self, "moe_lora_config", None), input_ids.shape)

    def _logits(self, input_ids: jax.Array, attention_mask: jax.Array | None, **arguments: Any) -> Any:
        hidden = self.hidden_states(input_ids, attention_mask, **arguments)
        if arguments["cache"] is None:
            return self.head(hidden)
        return self.head(hidden[0]), hidden[1]

    @in_its_precision
    def hidden_states(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        task_ids: jax.Array | None = None,
    ) -> Any:
        """Hidden states after the final norm: [batch, seq, hidden], or (those, cache) if a cache is given.

        Args:
            input_ids: integers [batch, seq]; what stands where the mask is zero does not matter.
            attention_mask: [batch, seq], non-zero for real tokens, padded on either side; None if all are real. With
                a cache, it covers the new tokens only.
            cache: from `empty_cache`, with room for the new tokens. A new one is returned; the given one stays.
            positions: integers [batch, seq] that replace the default, which counts the real tokens of each row.
                They set rotary angles and window distances; causal order is always that of the columns.
            segment_ids: integers [batch, seq] in place of attention_mask, for rows of several sequences (packing):
                1, 1, 1, 2, 2, 0, 0; 0 is padding. Tokens see their own segment alone, and positions count from its
                first token: each sequence gets what it would get in a row of its own. Not with a cache.
            task_ids: integers [batch] or [batch, n], for an adapter that routes by task.

        Raises:
            ValueError: shapes that do not fit, a full cache, task ids that are missing or that nothing reads, token ids
                outside the vocabulary (not under jit, where ids have no values yet).
        """
        input_ids = given_ids(input_ids)
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids: found shape {input_ids.shape}, expected [batch, seq]")
        problems = [
            f"{name}: found shape {jnp.shape(array)}, expected that of input_ids, {input_ids.shape}"
            for name, array in (
                ("attention_mask", attention_mask),
                ("positions", positions),
                ("segment_ids", segment_ids),
            )
            if array is not None and jnp.shape(array) != input_ids.shape
        ]
        if segment_ids is not None:
            others = {"attention_mask": attention_mask, "cache": cache}
            problems += [f"segment_ids and {name}: found both" for name, other in others.items() if other is not None]
        rows = getattr(self, "moe_lora_rows", None)  # of an AdapterBank: the layers see tokens, not rows
        if rows is not None and rows.get_value().shape != input_ids.shape[:1]:
            problems.append(
                f"adapters: found {rows.get_value().shape[0]} selected, expected one for each of the "
                f"{input_ids.shape[0]} rows of input_ids: call AdapterBank.select"
            )
        if problems:
            raise ValueError("; ".join(problems))
        segments = None if segment_ids is None else segment_runs(jnp.asarray(segment_ids))
        real = segments if attention_mask is None else jnp.asarray(attention_mask)
        real = None if real is None else real != 0
        check_ids(self, input_ids, real)
        input_ids = jnp.asarray(input_ids)
        if real is not None:
            input_ids = jnp.where(real, input_ids, 0)  # an id without a row would be NaN, and 0 * NaN is NaN
        positions = None if positions is None else jnp.asarray(positions, jnp.int32)
        hidden, cache = self._route_and_decode(input_ids, real, positions, cache, segments, task_ids)
        return hidden if cache is None else (hidden, cache)

    def _route_and_decode(
        self,
        input_ids: jax.Array,
        real: jax.Array | None,
        positions: jax.Array | None,
        cache: Any,
        segments: jax.Array | None,
        task_ids: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        router = self.moe_lora_router
        if task_ids is not None and (router is None or router.reads_hidden):
            raise ValueError("task_ids were given, but this model has no adapter that routes by task")
        if router is None:
            return self.model(input_ids, real, positions, cache, segments)
        if not router.reads_hidden:
            router.route_tasks(task_ids)
            hidden, cache = self.model(input_ids, real, positions, cache, segments)
        else:
            first, second = cache if cache is not None else (None, None)
            router.begin_first_pass()
            # without gates: without the adapter
            hidden, first = self.model(input_ids, real, positions, first, segments)
            router.route_hidden(hidden)
            hidden, second = self.model(input_ids, real, positions, second, segments)
            cache = None if cache is None else (first, second)
        router.shared.clear()
        return hidden, cache

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """A cache for `batch` rows of at most `capacity` tokens: a pair of them where a router needs a first pass."""
        two_passes = self.moe_lora_router is not None and self.moe_lora_router.reads_hidden
        empty = KVCache.empty(self.config, batch, capacity)
        return (empty, empty) if two_passes else empty

    def linear_order(self) -> list[str]:
        """The decoder's linear layers in the order in which transformers traverses them."""
        names = [".".join(map(str, p)) for p, m in nnx.iter_modules(self.model) if linear_map(m, {})]
        return traversal_order(f"model.{name}" for name in names)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits of final hidden states: [..., hidden] -> [..., vocab], in the dtype of the weights."""
        return self._scores(hidden, matrix_of(self._head_layer), None)

    def scorer(self) -> Callable[[jax.Array], jax.Array] | None:
        """`head` for many calls within one program, its sums in fp32 not rounded; None if an adapter is at the head.

        On a mesh, the head's matrix is gathered over "fsdp" here, once for all calls.
        """
        matrix = matrix_of(self._head_layer)
        if matrix is None:
            return None
        mesh = self.model.mesh
        if mesh is not None and isinstance(matrix, jax.Array):
            where = base_when_due("lm_head.kernel", matrix.shape, mesh)
            matrix = jax.lax.with_sharding_constraint(matrix, where)
        return partial(self._scores, matrix=matrix, dtype=jnp.float32)

    @property
    def _head_layer(self) -> Any:
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    @in_its_precision
    def _scores(self, hidden: jax.Array, matrix: Matrix | None, dtype: Any) -> jax.Array:
        flat, tied = hidden.reshape(-1, hidden.shape[-1]), self.config.tie_word_embeddings
        if matrix is not None:
            logits = product(flat, matrix, tied=tied, dtype=dtype)
        else:
            logits = self._head_layer.attend(flat) if tied else self.lm_head(flat)
        if self.config.logits_scaling != 1:
            logits = (logits.astype(jnp.float32) / self.config.logits_scaling).astype(logits.dtype)
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits.reshape(*hidden.shape[:-1], -1)
