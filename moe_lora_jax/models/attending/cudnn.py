"""Attention by NVIDIA's cuDNN, through `jax.nn.dot_product_attention`. On GPUs that are here, in half precision."""

from typing import Literal

import jax

from moe_lora_jax.models.config import DecoderConfig
from moe_lora_jax.models.masks import Visibility


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sight: Visibility,
    *,
    scale: float,
    softcap: float | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """As `plain.attend`, for tokens that see each other (no cache), without a softcap.

    Where nothing is padded or packed, cuDNN needs no mask, and a window is its own. Elsewhere it reads one mask
    [batch, 1, queries, keys] for all heads.
    """
    assert softcap is None
    query, key, value = (array.swapaxes(1, 2) for array in (query, key, value))
    is_causal = sight.real is None and sight.queries.segments is None and sight.which is None
    window = sight.windows[0] if is_causal else None
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=None if is_causal else sight.mask(),
        scale=scale,
        is_causal=is_causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return mixed.swapaxes(1, 2)


def unable(config: DecoderConfig, platform: str, length: int) -> str | None:
    """Why cuDNN cannot; None if it can."""
    if platform not in ("gpu", "cuda"):
        return f"platform: found {platform}, expected gpu"
    if config.dtype not in ("bfloat16", "float16"):
        return f"dtype: found {config.dtype}, expected bfloat16 or float16"
    if (problem := unsuited(config)) is not None:
        return problem
    if jax.default_backend() != "gpu":
        return "GPU: found none on this machine, expected one to compile cuDNN's call for"
    largest = 256 if float(jax.devices()[0].compute_capability) >= 9 else 128
    if config.head_dim % 8 or config.head_dim > largest:
        return f"head_dim: found {config.head_dim}, expected a multiple of 8 up to {largest}"
    return f"tokens of a row: found {length}, expected an even number" if length % 2 else None


def unsuited(config: DecoderConfig) -> str | None:
    """Why it never can for such a model; None if it depends on the machine, the dtype and the sizes."""
    if config.attn_logit_softcapping is not None:
        return f"attn_logit_softcapping: found {config.attn_logit_softcapping}, expected none"
    return None
