"""Tensors that a layout does not store as we do, computed from those that it stores.

A rule only moves values. Where another program splits one of our tensors into factors, the product is computed here: in
float64, given in float32, and only when the tensor is asked for. A product has no one way back, so that what has become
one is read and not written.
"""

import re
from collections.abc import Callable, Mapping
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np

from moe_lora_interop.disk.lazy import Lazy, Tensor
from moe_lora_interop.rules.tensors import Canonical

Derive = Callable[[Canonical, Mapping[str, Any]], tuple[Canonical, list[str]]]
"""(tensors as the rules give them, their config with the reader's options) -> (ours, what does not fit)."""
NEVER = -1e9
"""A logit beside which others are all: exp(NEVER) is 0."""


def cores_into_b(tensors: Canonical, given: Mapping[str, Any]) -> tuple[Canonical, list[str]]:
    """CoMoL: y = B (sum_e p_e C_e)^T A x, so B_e = B C_e^T beside one A; with `core_router`, p = softmax(R A x)."""
    found, problems = {slot: t for slot, t in tensors.items() if slot[1] != "core"}, []
    for module in [module for module, role in tensors if role == "core"]:
        roles = ("core", "lora_A", "lora_B", "router")
        if any((module, role) not in tensors for role in roles):
            continue  # said to be missing by whoever knows what the config implies
        core, a, b, router = (tensors[module, role] for role in roles)
        rank = a.shape[1]
        expected = {"core": (core, (*core.shape[:1], rank, rank)), "lora_B": (b, (1, *b.shape[1:2], rank))}
        if given.get("core_router"):
            expected["router"] = (router, (*router.shape[:1], rank))
        wrong = [
            f"{module} {role}: shape {list(t.shape)}, expected {list(shape)}"
            for role, (t, shape) in expected.items()
            if t.shape != shape
        ]
        problems += wrong
        if wrong:
            continue
        found[module, "lora_A"] = computed(a.shape, lambda a: a, a)
        found[module, "lora_B"] = computed((core.shape[0], b.shape[1], rank), lambda b, core: b @ core.mT, b, core)
        if given.get("core_router"):
            found[module, "router"] = computed((router.shape[0], a.shape[2]), lambda r, a: r @ a[0], router, a)
    return found, problems


def task_matrices_into_b(tensors: Canonical, given: Mapping[str, Any]) -> tuple[Canonical, list[str]]:
    """MTL-LoRA: y = (sum_j w_tj B_j) L_t A x for task t, w_t = softmax(z_t / temperature), L_t [r, r] or a diagonal.

    So expert t is B_t = (sum_j w_tj B_j) L_t beside one A, and a table of logits gives task t its expert alone.
    """
    found: Canonical = {slot: t for slot, t in tensors.items() if slot[1] == "lora_A"}
    problems: list[str] = []
    temperature = given.get("temperature", 1.0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < np.inf:
        return found, [f"option temperature: found {temperature!r}, expected a number > 0"]

    def of_tasks(up: np.ndarray, logits: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        weights = np.exp((logits - logits.max(1, keepdims=True)) / temperature)
        mixed = np.einsum("tj,jor->tor", weights / weights.sum(1, keepdims=True), up)
        return mixed @ matrix if matrix.ndim == 3 else mixed * matrix[:, None]

    for module in [module for module, role in tensors if role == "up"]:
        own = {role: tensor for (path, role), tensor in tensors.items() if path == module}
        matrix = own.get("task_matrix", own.get("task_diagonal"))
        if matrix is None or len(own) != 4:
            problems.append(f"{module}: found {', '.join(own)}; expected lora_A, lora_B, lora_B_w and lora_lambdas")
            continue
        (one, rank, _), (parts, out, inner), (tasks, weights) = (own[r].shape for r in ("lora_A", "up", "up_logits"))
        if (one, inner, weights) != (1, rank, parts) or matrix.shape != (tasks, *[rank] * (matrix.ndim - 1)):
            shapes = {role: list(t.shape) for role, t in own.items()}
            problems.append(f"{module}: found {shapes}, expected the same rank, tasks and number of up matrices in all")
            continue
        found[module, "lora_A"] = computed(own["lora_A"].shape, lambda a: a, own["lora_A"])
        found[module, "lora_B"] = computed((tasks, out, rank), of_tasks, own["up"], own["up_logits"], matrix)
        found[module, "task_embedding"] = np.where(np.eye(tasks), 0, NEVER).astype(np.float32)
    return found, problems


def gates_into_table(tensors: Canonical, given: Mapping[str, Any]) -> tuple[Canonical, list[str]]:
    """A gate and a task embedding on every layer: z_t = G T[t], a table of logits."""
    found, problems = {slot: t for slot, t in tensors.items() if slot[1] not in ("router", "task_embedding")}, []
    for module in [module for module, role in tensors if role == "router" and (module, "task_embedding") in tensors]:
        gate, table = tensors[module, "router"], tensors[module, "task_embedding"]
        if gate.shape[1] != table.shape[1]:
            problems.append(f"{module}: found a gate {list(gate.shape)} and embeddings {list(table.shape)}")
            continue
        found[module, "task_embedding"] = computed((table.shape[0], gate.shape[0]), lambda g, t: t @ g.T, gate, table)
    return found, problems


def layers_into_one(tensors: Canonical, given: Mapping[str, Any]) -> tuple[Canonical, list[str]]:
    """X-LoRA's classifier without an activation between its layers, z = W_n (... (W_0 h + b_0) ...) + b_n, as one."""
    if given.get("enable_relu_and_dropout") is not False:
        return tensors, []
    weights, biases = (_in_order(tensors, role) for role in ("router", "router_bias"))
    sizes = [(w.shape[1], w.shape[0]) for w in weights]
    fits = all(before[1] == after[0] for before, after in pairwise(sizes))
    if len(weights) != given.get("xlora_depth") or len(biases) not in (0, len(weights)) or not fits:
        layers = f"{len(weights)} weights of in, out = {sizes} and {len(biases)} biases"
        return tensors, [f"(model) router: found {layers}, expected xlora_depth = {given.get('xlora_depth')} layers"]
    found = {slot: tensor for slot, tensor in tensors.items() if slot[0]}

    def weight(*weights: np.ndarray) -> np.ndarray:
        return reduce(lambda before, after: after @ before, weights)

    def bias(*layers: np.ndarray) -> np.ndarray:
        pairs = zip(layers[: len(weights)], layers[len(weights) :], strict=True)
        return reduce(lambda before, layer: layer[0] @ before + layer[1], pairs, np.zeros(sizes[0][0]))

    found["", "router_0"] = computed((sizes[-1][1], sizes[0][0]), weight, *weights)
    if biases:
        found["", "router_bias_0"] = computed((sizes[-1][1],), bias, *weights, *biases)
    return found, []


def _in_order(tensors: Canonical, role: str) -> list[Tensor]:
    """role_0, role_1, ..., role_10 of the model."""
    found = {
        int(m[1]): t for (path, r), t in tensors.items() if path == "" and (m := re.fullmatch(rf"{role}_(\d+)", r))
    }
    return [found[number] for number in sorted(found)]


def computed(shape: tuple[int, ...], formula: Callable[..., np.ndarray], *tensors: Tensor) -> Lazy:
    """What `formula` makes of these tensors."""

    def read() -> np.ndarray:
        return formula(*(np.asarray(t).astype(np.float64) for t in tensors)).astype(np.float32)

    return Lazy(np.dtype(np.float32), shape, read)
