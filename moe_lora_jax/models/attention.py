"""Grouped-query self-attention with rotary positions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_lora_jax.models.attending import Attend
from moe_lora_jax.models.cache import write
from moe_lora_jax.models.config import DecoderConfig
from moe_lora_jax.models.masks import Visibility
from moe_lora_jax.models.norm import Norm
from moe_lora_jax.models.rope import Rotary, rotate


class LayerCache(NamedTuple):
    """One layer's share of a KVCache: keys and values [batch, kv_heads, capacity, head_dim], and where to write."""

    keys: jax.Array
    values: jax.Array
    slot: jax.Array


class Attention(nnx.Module):
    """`self_attn` of a decoder layer: q, k, v, o projections, optional norms on q and k, rotation, attention.

    q, k and v may be one projection, `qkv_proj`, whose outputs lie in this order.

    The projections are called on [tokens, features]: XLA:CPU transposes the cotangent of a 3-D activation for the
    weight gradient, which costs a third of a LoRA step (on a TPU both are within 4 %). They may be replaced by adapters
    with the same call.

    Source: {Qwen3,Gemma3,Olmo2,Ministral3,Phi3}Attention in transformers/models/*/modeling_*.py@5.24.0.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        width = config.num_attention_heads * config.head_dim
        shared_width = config.num_key_value_heads * config.head_dim

        def linear(size_in: int, size_out: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(size_in, size_out, use_bias=bias, param_dtype=config.dtype, rngs=rngs)

        if config.fused:
            self.qkv_proj = linear(config.hidden_size, width + 2 * shared_width, config.qkv_bias)
        else:
            self.q_proj = linear(config.hidden_size, width, config.qkv_bias)
            self.k_proj = linear(config.hidden_size, shared_width, config.qkv_bias)
            self.v_proj = linear(config.hidden_size, shared_width, config.qkv_bias)
        self.o_proj = linear(width, config.hidden_size, config.output_bias)
        if config.qk_norm is not None:
            is_whole = config.qk_norm == "width"
            self.q_norm = Norm(width if is_whole else config.head_dim, config)
            self.k_norm = Norm(shared_width if is_whole else config.head_dim, config)
        self.borders = (width, width + shared_width) if config.fused else None
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        self.scale = config.attention_scale
        self.softcap = config.attn_logit_softcapping
        self.rope_pairs = config.rope_pairs

    def __call__(
        self,
        x: jax.Array,
        batch: int,
        rotary: Rotary,
        sight: Visibility,
        cache: LayerCache | None,
        attend: Attend,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x`: [batch * seq, hidden] -> the same shape, and the cache with the new keys and values if one was given."""
        query, key, value = self._projected(x)
        if self.qk_norm == "width":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (self._heads(part, batch) for part in (query, key, value))
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (rotate(part, rotary, pairs=self.rope_pairs) for part in (query, key))
        if rotary.query_scale is not None:
            query = query * rotary.query_scale.astype(query.dtype)
        if cache is not None:
            cache = LayerCache(write(cache.keys, key, cache.slot), write(cache.values, value, cache.slot), cache.slot)
            key, value = cache.keys, cache.values
        mixed = attend(query, key, value, sight, scale=self.scale, softcap=self.softcap)
        mixed = checkpoint_name(mixed.transpose(0, 2, 1, 3).reshape(x.shape[0], -1), "context")
        return checkpoint_name(self.o_proj(mixed), "out_proj"), cache

    def _projected(self, x: jax.Array) -> list[jax.Array]:
        if self.borders is not None:
            parts = jnp.split(self.qkv_proj(x), self.borders, axis=-1)
        else:
            parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        return [checkpoint_name(p, f"{n}_proj") for p, n in zip(parts, ("query", "key", "value"), strict=True)]

    def _heads(self, x: jax.Array, batch: int) -> jax.Array:
        """[batch * seq, heads * head_dim] -> [batch, heads, seq, head_dim]."""
        return x.reshape(batch, x.shape[0] // batch, -1, self.head_dim).transpose(0, 2, 1, 3)
