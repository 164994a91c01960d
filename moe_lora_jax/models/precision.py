"""In which precision a model's products are computed: its dtype says it, unless the user does."""

import contextlib
from collections.abc import Callable
from functools import wraps
from typing import Any

import jax


def in_its_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """Products of fp32 in this method of a model are of fp32, at the precision "highest".

    Otherwise TPUs would round their operands to bf16, and NVIDIA's GPUs to TF32, and a float32 model would not be one.
    Products of bf16 are those of bf16 at any precision. What `jax.default_matmul_precision` says comes first.
    """

    @wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_said = jax.default_matmul_precision.value is not None or self.config.dtype != "float32"
        with contextlib.nullcontext() if is_said else jax.default_matmul_precision("highest"):
            return method(self, *args, **kwargs)

    return called
