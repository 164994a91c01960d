"""How a layer is a matrix: which axes of its input it contracts, and which of its output are new."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class LinearMap:
    """x [..., *in_shape, ...] -> y [..., *out_shape, ...], every other axis being passed on in its order.

    A layer of this kind is a matrix of [in, out] with in = prod(in_shape) and out = prod(out_shape), both in the order
    of the activations, as Hugging Face flattens heads.

    Args:
        in_shape: sizes of the contracted axes, in the input's order.
        out_shape: sizes of the new axes, in the output's order.
        in_axes: where those are in the input; negative numbers count from the end.
        out_axes: where these are in the output.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: tuple[int, ...] = (-1,)
    out_axes: tuple[int, ...] = (-1,)

    @classmethod
    def of_einsum(cls, equation: str, kernel_shape: Sequence[int]) -> "LinearMap | None":
        """The map of `einsum(equation, x, kernel)`, e.g. "BTD,DNH->BTNH" with [D, N, H].

        None if it is not one: an axis of the kernel that is kept on both sides (a matrix per head) or only summed, or
        other axes that change their order.
        """
        given, kernel, result = re.split(",|->", equation.replace(" ", ""))
        labels = [side.replace("...", "") for side in (given, kernel, result)]
        if "..." in kernel or any(len(set(side)) != len(side) for side in labels):
            return None
        sizes = dict(zip(kernel, kernel_shape, strict=True))
        contracted = [c for c in given if c in sizes and c not in result]
        new = [c for c in result if c in sizes and c not in given]
        kept = ["".join(c for c in side if c not in sizes) for side in (given, result)]
        if len(contracted) + len(new) != len(sizes) or not contracted or not new or kept[0] != kept[1]:
            return None
        return cls(
            tuple(sizes[c] for c in contracted),
            tuple(sizes[c] for c in new),
            tuple(_place(given, c) for c in contracted),
            tuple(_place(result, c) for c in new),
        )

    @property
    def in_features(self) -> int:
        return math.prod(self.in_shape)

    @property
    def out_features(self) -> int:
        return math.prod(self.out_shape)

    @property
    def is_last_axis(self) -> bool:
        """Whether it is that of `nnx.Linear`: the last axis for the last axis."""
        return self.in_axes == self.out_axes == (-1,)

    def flatten(self, x: jax.Array) -> jax.Array:
        """The layer's input as [tokens, in]."""
        if self.in_axes != (-1,):
            x = jnp.moveaxis(x, self.in_axes, range(-len(self.in_axes), 0))
        tokens = x.shape[: x.ndim - len(self.in_axes)]
        return x.reshape(math.prod(tokens), self.in_features)

    def restore(self, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """[tokens, out] in the shape of the layer's output."""
        if self.out_axes == (-1,):
            return y.reshape(shape)
        places = [axis % len(shape) for axis in self.out_axes]
        tokens = [size for axis, size in enumerate(shape) if axis not in places]
        return jnp.moveaxis(y.reshape(*tokens, *self.out_shape), range(-len(places), 0), places)


class LikeLinear(nnx.Module):
    """A layer that is no `nnx.Linear`, but a matrix of its `in_features` and `out_features` in the same way."""

    in_features: int
    out_features: int


LayerTypes = Mapping[type, Callable[[Any], LinearMap | None]]
"""{class of a layer: its map, or None where it is no matrix}."""


def linear_map(layer: Any, layer_types: LayerTypes) -> LinearMap | None:
    """The map of an `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum` or one of `layer_types`; None of anything else."""
    for kind, map_of in layer_types.items():
        if isinstance(layer, kind):
            return map_of(layer)
    if isinstance(layer, nnx.Linear | LikeLinear):
        return LinearMap((layer.in_features,), (layer.out_features,))
    if isinstance(layer, nnx.LinearGeneral):
        return None if layer.batch_axis else _of_linear_general(layer)
    if isinstance(layer, nnx.Einsum):
        return LinearMap.of_einsum(layer.einsum_str, layer.kernel_shape)
    return None


def _of_linear_general(layer: nnx.LinearGeneral) -> LinearMap:
    """Flax sorts the axes, so that `in_features` is in the input's order whatever the order of `axis`."""
    axes, out_shape = sorted(layer.axis, key=lambda axis: (axis < 0, axis)), tuple(layer.out_features)
    return LinearMap(tuple(layer.in_features), out_shape, tuple(axes), tuple(range(-len(out_shape), 0)))


def _place(side: str, label: str) -> int:
    """From the end, unless "..." stands between: then from the front."""
    parts = re.findall(r"\.\.\.|\w", side)
    place = parts.index(label)
    return place if "..." in parts[place:] else place - len(parts)
