"""The decoder stack. Attribute names are Hugging Face's: an NNX path joined by dots is the name of the HF module."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_lora_jax.models.activations import ACTIVATIONS
from moe_lora_jax.models.attending import Attend, Form, choose
from moe_lora_jax.models.attention import Attention, LayerCache
from moe_lora_jax.models.cache import KVCache
from moe_lora_jax.models.config import DecoderConfig
from moe_lora_jax.models.masks import Tokens, Visibility, real_positions, segment_positions
from moe_lora_jax.models.norm import Norm
from moe_lora_jax.models.repeat import run_layers
from moe_lora_jax.models.rope import Rotary, rotary_tables
from moe_lora_jax.sharding import dividing, row_parts, row_sharding, when_due


class FeedForward(nnx.Module):
    """`mlp`: `down(act(gate(x)) * up(x))` on [tokens, hidden]. Gate and up may be one linear layer, `gate_up_proj`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        def linear(size_in: int, size_out: int) -> nnx.Linear:
            return nnx.Linear(size_in, size_out, use_bias=config.mlp_bias, param_dtype=config.dtype, rngs=rngs)

        self.fused = config.fused
        if self.fused:
            self.gate_up_proj = linear(config.hidden_size, 2 * config.intermediate_size)
        else:
            self.gate_proj = linear(config.hidden_size, config.intermediate_size)
            self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)
        self.hidden_act = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        """[tokens, hidden] -> [tokens, hidden]."""
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        gate, up = checkpoint_name(gate, "mlpwi_0"), checkpoint_name(up, "mlpwi_1")
        return checkpoint_name(self.down_proj(ACTIVATIONS[self.hidden_act](gate) * up), "mlpwo")


class DecoderLayer(nnx.Module):
    """One block, with the norms that `config.layer_norms` names; the others are left out.

        h = x + m norm(attention(norm(x)));  y = h + m norm(mlp(norm(h)))

    or, if both halves share the first norm, `y = x + attention(norm(x)) + mlp(norm(x))`. m is `residual_multiplier`.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.self_attn = Attention(config, rngs=rngs)
        self.mlp = FeedForward(config, rngs=rngs)
        self.norms = config.layer_norms
        self.multiplier = config.residual_multiplier
        for name in self.norms[:4]:
            if name is not None:
                setattr(self, name, Norm(config.hidden_size, config))

    def __call__(
        self,
        x: jax.Array,
        batch: int,
        rotary: Rotary,
        sight: Visibility,
        cache: LayerCache | None,
        attend: Attend,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x`: [batch * seq, hidden] -> the same shape, and the updated cache if one was given."""
        normed = self._normed(self.norms.before_attention, x)
        mixed, cache = self.self_attn(normed, batch, rotary, sight, cache, attend)
        h = x + times(self._normed(self.norms.after_attention, mixed), self.multiplier)
        if not self.norms.shared:
            normed = self._normed(self.norms.before_mlp, h)
        return h + times(self._normed(self.norms.after_mlp, self.mlp(normed)), self.multiplier), cache

    def _normed(self, name: str | None, x: jax.Array) -> jax.Array:
        return x if name is None else getattr(self, name)(x)


def times(x: jax.Array, factor: float) -> jax.Array:
    """The product in float32, in the dtype of `x`: JAX alone would round the factor to that first."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


class Decoder(nnx.Module):
    """`model`: embeddings, layers, final norm.

    `scan_layers` and `remat` say how the layers run (see `run_layers`), `attention` in which form they attend (see
    `attending.choose`), `mesh` on which devices.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.scan_layers: bool = False
        self.remat: str = "none"
        self.attention: Form = "auto"
        self.mesh: Mesh | None = None
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, param_dtype=config.dtype, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = Norm(config.hidden_size, config)

    def __call__(
        self,
        input_ids: jax.Array,
        real: jax.Array | None,
        positions: jax.Array | None,
        cache: KVCache | None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """`input_ids` [batch, seq] -> hidden states after the final norm [batch, seq, hidden], and the extended cache.

        Args:
            real: bool [batch, seq], False for padding; None if there is none.
            positions: int32 [batch, seq] for the rotation; None counts the real tokens of each row or segment.
            cache: earlier tokens of the same rows; None without any, and then None is returned.
            segments: integers [batch, seq], without a cache: each number is a sequence, see `segment_runs`.
        """
        batch, length = input_ids.shape
        config, slots = self.config, jnp.arange(length)
        attend = choose(
            self.attention,
            config,
            self.mesh,
            length,
            length if cache is None else cache.capacity,
            cached=cache is not None,
            placed=positions is not None,
        )
        if cache is None:
            if positions is None and segments is not None:
                positions = segment_positions(segments)
            elif positions is None:
                positions = slots[None] if real is None else real_positions(real)
            queries = keys = Tokens(slots, positions, segments)
        else:
            new = jnp.ones(input_ids.shape, bool) if real is None else real
            positions = cache.next_positions(new) if positions is None else positions
            queries = Tokens(cache.length + slots, positions, None)
            cache = cache.reserve(new, positions)
            keys, real = Tokens(jnp.arange(cache.capacity), cache.positions, None), cache.real
        ropes = dict.fromkeys(config.layer_ropes)
        rotary = {rope: rotary_tables(rope, positions, config.head_dim, segments) for rope in ropes}

        windows = tuple(dict.fromkeys(config.layer_windows))
        one_program = cache is None and self.scan_layers and len(windows) > 1

        def sight(window: int | None) -> Visibility:
            if one_program:  # for layers of every window
                return Visibility(queries, keys, real, jnp.asarray(windows.index(window), jnp.int32), windows)
            return Visibility(queries, keys, real, None, (window,))

        x = self._embedded(input_ids.reshape(-1), batch)
        if config.embedding_scale is not None:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)  # rounded to the dtype, like transformers
        x = times(x, config.embedding_multiplier)
        x = self._in_place(x, batch)
        pairs = list(zip(config.layer_ropes, config.layer_windows, strict=True))
        kinds = list(dict.fromkeys(pairs))
        contexts = [(rotary[rope], sight(window)) for rope, window in kinds]
        if cache is None and (self.scan_layers or self.remat != "none"):
            x = run_layers(
                self.layers,
                x,
                lambda layer, x, context: self._in_place(self._due(layer)(x, batch, *context, None, attend)[0], batch),
                contexts,
                [kinds.index(pair) for pair in pairs],
                scan=self.scan_layers,
                remat=self.remat,
            )
            return self.norm(x).reshape(batch, length, -1), None
        all_keys, all_values = [], []
        for index, layer in enumerate(self.layers):
            own = None if cache is None else LayerCache(cache.keys[index], cache.values[index], queries.slots[0])
            x, own = layer(x, batch, *contexts[kinds.index(pairs[index])], own, attend)
            x = self._in_place(x, batch)
            if own is not None:
                all_keys.append(own.keys)
                all_values.append(own.values)
        if cache is not None:
            cache = replace(cache, keys=tuple(all_keys), values=tuple(all_values))
        return self.norm(x).reshape(batch, length, -1), cache

    def _embedded(self, ids: jax.Array, batch: int) -> jax.Array:
        """[tokens] -> [tokens, hidden]. On a mesh the table stays where it lies; XLA alone would gather it.

        Every device looks up the tokens of all of "fsdp" in its own features of the table. Then features and tokens
        change places, which `_in_place` asks for.
        """
        if self.mesh is None:
            return self.embed_tokens(ids)
        is_spread = batch % row_parts(self.mesh) == 0
        rows = dividing(ids.shape[0], ("data",) if is_spread else (), self.mesh) or None
        features = dividing(self.config.hidden_size, ("fsdp",), self.mesh) or None
        x = self._lying(self.embed_tokens(self._lying(ids, rows)), rows, features)
        return x if is_spread else self._lying(x)

    def _due(self, layer: nnx.Module) -> Any:
        """The layer, a copy that runs now, with its adapter gathered over "fsdp"."""
        if self.mesh is None:
            return layer
        gathered = []
        for path, variable in nnx.to_flat_state(nnx.state(layer, nnx.LoRAParam)):
            where = when_due(path, variable, self.mesh)
            if where is not None:
                gathered.append((path, variable.replace(jax.lax.with_sharding_constraint(variable[...], where))))
        nnx.update(layer, nnx.from_flat_state(gathered))
        return layer

    def _lying(self, x: jax.Array, *axes: tuple[str, ...] | None) -> jax.Array:
        assert self.mesh is not None
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))

    def _in_place(self, x: jax.Array, batch: int) -> jax.Array:
        """Keeps rows on their devices: XLA might move activations instead of gathering a layer's weights."""
        if self.mesh is None or batch % row_parts(self.mesh):
            return x
        return jax.lax.with_sharding_constraint(x, row_sharding(self.mesh))
