"""LoRA products on a CPU, one for each adapter in the batch.

vLLM 0.32's own index the weights by the slot of every token. The slot of a token without an adapter is -1, so it gets
the delta of the last slot as soon as another token of its batch has an adapter; and each token gets a copy of weights.
Arguments are those of `vllm.lora.ops.torch_ops`: weights [slot, (1,) out, in], x and y [token, size].
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def bgmv_shrink(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    scaling: float = 1.0,
) -> None:
    """y = scaling A x, computed in the dtype of y; y of a token without an adapter stays."""
    for rows, weight in _groups(inputs, lora_b_weights, lora_indices_tensor, output_tensor.dtype):
        y = inputs[rows].to(output_tensor.dtype) @ weight.T
        output_tensor[rows, : y.shape[1]] = y if scaling == 1 else y * scaling


def bgmv_expand(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    add_inputs: bool = True,
) -> None:
    """y = B x, or y += B x; y of a token without an adapter stays, or is 0 where nothing is added to it."""
    size = min(lora_b_weights.shape[-2], output_tensor.shape[1])
    bgmv_expand_slice(inputs, lora_b_weights, output_tensor, lora_indices_tensor, 0, size, add_inputs)


def bgmv_expand_slice(
    inputs: Tensor,
    lora_b_weights: Tensor,
    output_tensor: Tensor,
    lora_indices_tensor: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """`bgmv_expand` into a part of y."""
    part = output_tensor[:, slice_offset : slice_offset + slice_size]
    if not add_inputs:
        part.zero_()
    for rows, weight in _groups(inputs, lora_b_weights, lora_indices_tensor, output_tensor.dtype):
        x, weight = inputs[rows].to(output_tensor.dtype), weight[:slice_size].T
        if isinstance(rows, slice):
            part.addmm_(x, weight)
        else:
            part.index_add_(0, rows, x @ weight)


def _groups(x: Tensor, weights: Tensor, slots: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor | slice, Tensor]]:
    """(rows, weight [out, in]) of every adapter in the batch.

    Raises:
        ValueError: there is not one slot for each token.
    """
    if len(slots) != len(x):
        raise ValueError(f"slots: found {len(slots)}, expected one for each of {len(x)} tokens")
    present = slots.unique().tolist()
    for slot in present:
        if slot >= 0:
            rows = slice(None) if len(present) == 1 else (slots == slot).nonzero()[:, 0]
            yield rows, weights[slot].flatten(0, -2).to(dtype)
