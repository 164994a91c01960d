"""How one layer of an adapter shows itself: its facts in a line, then its variables. A whole model: `summary`."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from flax.nnx import reprlib, visualization

from moe_lora_jax.layers.mixing import MoeLoraParam
from moe_lora_jax.layers.shared import Shared

_HIDDEN = (nnx.Dropout, nnx.RngStream, nnx.Rngs, Shared)


class Described:
    """A mix-in for modules, before `nnx.Module`. `repr` in a terminal and treescope (`nnx.display`) in a notebook show
    `facts()`, the number of the adapter's parameters, and the variables and modules inside."""

    def facts(self) -> str:
        """What the layer is, in one line."""
        raise NotImplementedError

    def __nnx_repr__(self) -> Iterator[Any]:
        shown = self._shown()
        for part in super().__nnx_repr__():  # type: ignore[misc]
            if isinstance(part, reprlib.Object):
                if not part.empty_repr:  # which stands for a module that was shown before
                    part = reprlib.Object(part.type, comment=f" # {self._line()}", empty_repr=self.facts())
                yield part
            elif part.key in shown:
                yield part

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from treescope import formatting_util, rendering_parts

        return visualization.render_object_constructor(
            object_type=type(self),
            attributes=self._shown(),
            path=path,
            subtree_renderer=subtree_renderer,
            first_line_annotation=rendering_parts.comment_color(rendering_parts.text(f" # {self._line()}")),
            color=formatting_util.color_from_string(type(self).__qualname__),
        )

    def _line(self) -> str:
        leaves = jax.tree.leaves(nnx.state(self, MoeLoraParam))  # type: ignore[call-overload]
        return f"{self.facts()}; {sum(math.prod(leaf.shape) for leaf in leaves):,} adapter parameters"

    def _shown(self) -> dict[str, Any]:
        kinds = (nnx.Variable, nnx.Module, nnx.List)
        inside = {n: v for n, v in vars(self).items() if isinstance(v, kinds) and not isinstance(v, _HIDDEN)}
        return {n: v for n, v in inside.items() if not (isinstance(v, nnx.List) and len(v) == 0)}


def experts_in_words(lora_a: Any, lora_b: Any, ranks: Sequence[int], scalings: Sequence[float]) -> str:
    """E, the shared A, r and alpha / r: one number where all experts have the same."""
    experts = lora_b.shape[0]
    if experts == 1:
        return f"one expert of rank {ranks[0]} (plain LoRA), scaling {scalings[0]:g}"
    shared = ", one shared A" if lora_a.shape[0] == 1 else ""
    rank = _one_or_all([str(r) for r in ranks])
    return f"{experts} experts of rank {rank}{shared}, scaling {_one_or_all([f'{s:g}' for s in scalings])}"


def _one_or_all(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else f"[{', '.join(values)}]"
