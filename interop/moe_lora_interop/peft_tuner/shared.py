"""How gates travel from a router to the layers that it serves, when it does not stand at the layer itself."""

from typing import Any

from torch import Tensor


class Shared:
    """One value of one adapter, written by its router and read by its layers.

    Gates [row, expert] (or [row, split, expert], [row, layer, expert]) of a router of the model, a row being a token or
    a whole sequence; the `Slots` of a feed-forward block; or task ids. A plain object and not a tensor of the module,
    so that it is no part of the state dict; copies and pickles of it are empty. It keeps its value until the next
    forward, because gradient checkpointing runs the layers again in the backward pass.
    """

    value: Any = None

    def get(self) -> Any:
        """The value.

        Raises:
            RuntimeError: no router has set one.
        """
        if self.value is None:
            raise RuntimeError(
                "a layer that gets its gates from a router of its block or model was called by itself: call the whole "
                "model, whose forward runs the router first"
            )
        return self.value

    def __getstate__(self) -> dict[str, Any]:
        return {}


def per_token(rows: Tensor, tokens: int) -> Tensor:
    """[row, ...] -> [token, ...]: each sequence's value for each of its tokens.

    Raises:
        ValueError: the tokens are not a whole number per row.
    """
    if len(rows) == tokens:
        return rows
    if len(rows) > tokens or tokens % len(rows):
        raise ValueError(
            f"this layer saw {tokens} tokens, but its router decided for {len(rows)} rows: a router of the model "
            "serves layers that see every token of its input (with lm_head among them, pass logits_to_keep=0)"
        )
    return rows.repeat_interleave(tokens // len(rows), dim=0)
