"""Grouped-query self-attention with rotary positions."""

from typing import NamedTuple

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe_lora_jax.models.attending import Attend
from moe_lora_jax.models.cache import write
from moe_lora_jax.models.config import DecoderConfig
from moe_lora_jax.models.masks import Visibility
from moe_lora_jax.models.norm import RMSNorm
from moe_lora_jax.models.rope import rotate


class LayerCache(NamedTuple):
    """One layer's share of a KVCache: keys and values [batch, kv_heads, capacity, head_dim], and where to write."""

    keys: jax.Array
    values: jax.Array
    slot: jax.Array


class Attention(nnx.Module):
    """`self_attn` of a decoder layer: q, k, v, o projections, optional norms on q and k, rotation, attention.

    The projections are called on [tokens, features]: XLA:CPU transposes the cotangent of a 3-D activation for the
    weight gradient, which costs a third of a LoRA step (on a TPU both are within 4 %). They may be replaced by adapters
    with the same call.

    Source: Qwen3Attention and Gemma3Attention in transformers/models/{qwen3,gemma3}/modeling_*.py@5.24.0.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        width = config.num_attention_heads * config.head_dim
        shared_width = config.num_key_value_heads * config.head_dim

        def linear(size_in: int, size_out: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(size_in, size_out, use_bias=bias, param_dtype=config.dtype, rngs=rngs)

        self.q_proj = linear(config.hidden_size, width, config.qkv_bias)
        self.k_proj = linear(config.hidden_size, shared_width, config.qkv_bias)
        self.v_proj = linear(config.hidden_size, shared_width, config.qkv_bias)
        self.o_proj = linear(width, config.hidden_size, config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config)
            self.k_norm = RMSNorm(config.head_dim, config)
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        self.scale = config.attention_scale
        self.softcap = config.attn_logit_softcapping

    def __call__(
        self,
        x: jax.Array,
        batch: int,
        rotary: tuple[jax.Array, jax.Array],
        sight: Visibility,
        cache: LayerCache | None,
        attend: Attend,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x`: [batch * seq, hidden] -> the same shape, and the cache with the new keys and values if one was given."""
        query = self._heads(checkpoint_name(self.q_proj(x), "query_proj"), batch)
        key = self._heads(checkpoint_name(self.k_proj(x), "key_proj"), batch)
        value = self._heads(checkpoint_name(self.v_proj(x), "value_proj"), batch)
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            cache = LayerCache(write(cache.keys, key, cache.slot), write(cache.values, value, cache.slot), cache.slot)
            key, value = cache.keys, cache.values
        mixed = attend(query, key, value, sight, scale=self.scale, softcap=self.softcap)
        mixed = checkpoint_name(mixed.transpose(0, 2, 1, 3).reshape(x.shape[0], -1), "context")
        return checkpoint_name(self.o_proj(mixed), "out_proj"), cache

    def _heads(self, x: jax.Array, batch: int) -> jax.Array:
        """[batch * seq, heads * head_dim] -> [batch, heads, seq, head_dim]."""
        return x.reshape(batch, x.shape[0] // batch, -1, self.head_dim).transpose(0, 2, 1, 3)
