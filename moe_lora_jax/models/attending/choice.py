"""Which form of attention a program has: the fastest that its devices have, unless the user says so."""

import logging
from functools import partial
from typing import Literal, Protocol, get_args

import jax
from jax.sharding import Mesh

from moe_lora_jax.models.attending import chunked, cudnn, plain, splash
from moe_lora_jax.models.config import DecoderConfig
from moe_lora_jax.models.masks import Visibility

logger = logging.getLogger(__name__)

Form = Literal["auto", "plain", "chunked", "cudnn", "splash"]
SHORT = 256**2
"""Up to so many pairs of a query and a key there are all scores at once: above it a CPU is faster block by block."""


class Attend(Protocol):
    """`plain.attend` says what it computes."""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        sight: Visibility,
        *,
        scale: float,
        softcap: float | None,
    ) -> jax.Array: ...


def check_attention(attention: str) -> None:
    """Raises ValueError unless it is a `Form`."""
    if attention not in get_args(Form):
        raise ValueError(f"attention: found {attention!r}, expected one of {', '.join(get_args(Form))}")


def choose(
    attention: Form, config: DecoderConfig, mesh: Mesh | None, queries: int, keys: int, *, cached: bool, placed: bool
) -> Attend:
    """The form for a program of so many queries and keys a row; one line through `logging` if it is not the wanted one.

    Args:
        attention: a `Form`. "auto" is splash on TPUs and cuDNN on GPUs; elsewhere plain, and chunked for many
            tokens.
        mesh: the devices to compile for; None is JAX's default ones.
        cached: the keys are those of a cache, for which there are the portable forms only.
        placed: positions were given by the caller; kernels measure windows by the default ones.
    """
    portable = {"plain": plain.attend, "chunked": chunked.attend}
    name = "plain" if queries * keys <= SHORT else "chunked"
    platform = _platform(mesh)
    wanted = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform) if attention == "auto" else attention
    if wanted in portable:
        return portable[wanted]
    if wanted is None or cached:
        return portable[name]
    problem = splash.unable(config, platform) if wanted == "splash" else cudnn.unable(config, platform, queries)
    if placed and any(window is not None for window in config.layer_windows):
        problem = problem or "positions: found given ones in a model with windows, expected the default"
    if problem is not None:
        logger.warning("attention is %s: %s cannot: %s", name, wanted, problem)
        return portable[name]
    return partial(splash.attend, mesh=mesh) if wanted == "splash" else cudnn.attend


def _platform(mesh: Mesh | None) -> str:
    if mesh is not None:
        return mesh.devices.flat[0].platform
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return getattr(device, "platform", device) or jax.default_backend()
