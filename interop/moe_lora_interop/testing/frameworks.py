"""What a routing gives in each framework, and its slopes, as float64. A framework is imported where it is asked for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moe_lora_interop.config.routing_rule import decision


class Answer(NamedTuple):
    """All [token, expert]. The slope of an output f is sum_e c_e df_e / dz_i, c being `cotangent`; for numpy by finite
    differences, and nan where they show a jump or a kink."""

    scores: np.ndarray
    gates: np.ndarray
    scores_slope: np.ndarray
    gates_slope: np.ndarray


Evaluate = Callable[[np.ndarray, np.ndarray], Answer]


def evaluator(rule: Any, framework: str, top_k: int | None) -> Evaluate:
    """The function from logits and a cotangent, [token, expert] in float64, to the answer of the rule's function."""
    return {"jax": _of_jax, "torch": _of_torch, "numpy": _of_numpy}[framework](rule, top_k)


def _of_jax(rule: Any, top_k: int | None) -> Evaluate:
    import jax
    import jax.numpy as jnp

    @jax.jit
    def answer(z: jax.Array, cotangent: jax.Array) -> Any:
        outputs, pull = jax.vjp(lambda z: decision(rule, "jax", z, top_k), z)
        zero = jnp.zeros_like(z)
        return *outputs, *pull((cotangent, zero)), *pull((zero, cotangent))

    def evaluate(z: np.ndarray, cotangent: np.ndarray) -> Answer:
        found = answer(jnp.asarray(z, jnp.float32), jnp.asarray(cotangent, jnp.float32))
        return Answer(*(np.asarray(a, np.float64) for a in found))

    return evaluate


def _of_torch(rule: Any, top_k: int | None) -> Evaluate:
    import torch

    def evaluate(z: np.ndarray, cotangent: np.ndarray) -> Answer:
        given = torch.tensor(z, dtype=torch.float32, requires_grad=True)
        weights, zero = torch.tensor(cotangent, dtype=torch.float32), torch.zeros_like(given)
        outputs = decision(rule, "torch", given, top_k)
        slopes = [
            torch.autograd.grad(output, given, weights, retain_graph=True, allow_unused=True)[0]
            if output.requires_grad
            else None
            for output in outputs
        ]
        found = [*outputs, *(zero if slope is None else slope for slope in slopes)]
        return Answer(*(a.detach().numpy().astype(np.float64) for a in found))

    return evaluate


def _of_numpy(rule: Any, top_k: int | None) -> Evaluate:
    step = 1e-6

    def outputs(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return decision(rule, "numpy", z, top_k)

    def evaluate(z: np.ndarray, cotangent: np.ndarray) -> Answer:
        here = outputs(z)
        slopes = np.zeros((2, *z.shape))
        for expert in range(z.shape[1]):  # of all tokens at once, as none sees another
            move = step * (np.arange(z.shape[1]) == expert)
            for slope, before, middle, after in zip(slopes, outputs(z - move), here, outputs(z + move), strict=True):
                left, right = ((cotangent * change).sum(-1) / step for change in (middle - before, after - middle))
                is_smooth = np.abs(right - left) <= 1e-5 * np.maximum(1, np.abs(left) + np.abs(right))
                slope[:, expert] = np.where(is_smooth, (left + right) / 2, np.nan)
        return Answer(*here, *slopes)

    return evaluate
