"""What an adapter's file holds beside the adapter: tensors of the base model, and modules that were trained whole."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_lora_interop.disk.files import TensorInfo
from moe_lora_interop.disk.lazy import Tensor
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.rules.base_tensors import name_in_base, whole_modules


def check_no_whole_modules(path: Path, raw: Mapping[str, Any], stored: Iterable[str]) -> None:
    """Raises CheckpointError if the file has modules that `modules_to_save` trained: without them it is another one."""
    names = raw.get("modules_to_save")
    keys = whole_modules(filter(_is_text, names), stored) if isinstance(names, list) else []
    if keys:
        cause = f"{', '.join(keys)} {'were' if keys[1:] else 'was'} trained as a whole"
        hint = "Only PyTorch can use that: load the adapter with PEFT, or train again without modules_to_save"
        problem = f"modules_to_save: found {names}, expected null: {cause}. {hint}"
        raise CheckpointError(f"{path} holds more than an adapter", [problem])


def warn_of_base_tensors(source: str, found: Mapping[str, Tensor]) -> None:
    """Says that tensors of the base model are left out, if there are any."""
    for note in left_out(found):
        warnings.warn(f"{source}: {note}", UserWarning, stacklevel=3)


def left_out(found: Mapping[str, Tensor | TensorInfo]) -> list[str]:
    """A sentence on the tensors of the base model that are left out, if there are any."""
    shown = [f"{name} {list(tensor.shape)}" for name, tensor in list(found.items())[:6]]
    names = ", ".join(shown) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
    note = (
        f"left out: {names}. These belong to the base model: PEFT saves them too if embeddings or the head are "
        "targeted or resized, MeteoRA saves all. moe-lora verify --base compares them with a base's own, and so does "
        "loading the adapter in JAX"
    )
    return [note] if found else []


def base_problems(found: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Iterator[str]:
    """In what the tensors of the base model that came with an adapter differ from those of a base at hand.

    Args:
        found: {name in the adapter: tensor}.
        base: {the same names: the base's tensor}; it is compared in the dtype of the found one. A name that is not
            here is not compared.
    """
    for name, expected in base.items():
        tensor = found[name]
        if tensor.shape != expected.shape:
            cause = "the vocabulary was resized, and the adapter's file has the new rows"
            yield _problem(name, f"shape {list(tensor.shape)}, the base has {list(expected.shape)}: {cause}")
        elif not _same(tensor, expected):
            yield _problem(name, "other values than the base: saved embedding rows or a head that was trained")


def _problem(name: str, what: str) -> str:
    return (
        f"{name_in_base(name)}: {what}. An adapter is all that is read here: use PEFT in PyTorch, or save the changed "
        "base model and load the adapter on it"
    )


def _same(values: Tensor, others: Tensor) -> bool:
    """Bit by bit, with `others` in the dtype of `values`."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = np.asarray(others).astype(values.dtype)
    return np.asarray(values).tobytes() == cast.tobytes()


def _is_text(name: Any) -> bool:
    return isinstance(name, str)
