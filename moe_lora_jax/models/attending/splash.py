"""Attention by the Pallas kernel that JAX brings for TPUs ("splash": flash attention that leaves out unseen blocks)."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from moe_lora_jax.models.config import DecoderConfig
from moe_lora_jax.models.masks import Visibility
from moe_lora_jax.sharding import BATCH_AXES, dividing

LANES = 128
"""Sequences are filled up to a multiple of it."""


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sight: Visibility,
    *,
    scale: float,
    softcap: float | None,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `plain.attend`, for tokens that see each other (no cache). What padding gets is finite and unused.

    Distances of windows are those of the slots: the same as of default positions within a row that is padded on its
    sides, and within a segment. On a mesh every device computes its rows and heads.

    Args:
        interpret: run the kernel's steps as ordinary operations, on any device.
    """
    segments = sight.keys.segments
    if segments is None and sight.real is not None:
        segments = sight.real
    segments = None if segments is None else jnp.broadcast_to(segments, (len(query), query.shape[2])).astype(jnp.int32)
    query = (query * scale).astype(query.dtype)
    forms = [partial(_here, window=window, softcap=softcap, interpret=interpret) for window in sight.windows]
    if mesh is not None:
        rows = dividing(len(query), BATCH_AXES, mesh) or None
        heads = PartitionSpec(rows, dividing(key.shape[1], ("tensor",), mesh) or None)
        specs = (heads, heads, heads, PartitionSpec(rows))
        forms = [jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False) for f in forms]
    if sight.which is None:
        return forms[0](query, key, value, segments)
    return jax.lax.switch(sight.which, forms, query, key, value, segments)


def _here(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    *,
    window: int | None,
    softcap: float | None,
    interpret: bool,
) -> jax.Array:
    """On one device: the kernel serves the query heads of one key head; rows and key heads are mapped over."""
    # Imported here: Pallas takes a second to load, and most programs are not for TPUs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, heads, length, head_dim = query.shape
    groups = key.shape[1]
    filled = -(-length // LANES) * LANES  # causal: no token sees what is filled in after it
    query, key, value = (jnp.pad(a, [(0, 0), (0, 0), (0, filled - length), (0, 0)]) for a in (query, key, value))
    ids = None
    if segments is not None:
        segments = jnp.pad(segments, [(0, 0), (0, filled - length)])
        ids = kernels.SegmentIds(segments, segments)

    shape = (filled, filled)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), offset=0)
    block = _block(filled)
    kernel = kernels.make_splash_mqa(
        masks.MultiHeadMask([mask] * (heads // groups)),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name="context",  # what a remat policy must keep so that the kernel runs once
        interpret=interpret,
    )
    grouped = query.reshape(batch, groups, heads // groups, filled, head_dim)
    of_group = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    mixed = jax.vmap(of_group, in_axes=(0, 0, 0, None if ids is None else 0))(grouped, key, value, ids)
    return mixed.reshape(batch, heads, filled, head_dim)[:, :, :length]


def _block(length: int) -> int:
    """Tokens of a block: the largest multiple of LANES that divides the length, up to 512, or 1,024 from 8,192 on."""
    largest = 1024 if length >= 8192 else 512
    return next(size for size in range(min(largest, length), 0, -LANES) if length % size == 0)


def unable(config: DecoderConfig, platform: str) -> str | None:
    """Why the kernel cannot; None if it can."""
    if platform != "tpu":
        return f"platform: found {platform}, expected tpu"
    if config.dtype != "bfloat16":  # fp16 does not compile; of fp32 the backward kernels would round to bf16
        return f"dtype: found {config.dtype}, expected bfloat16"
    return None
