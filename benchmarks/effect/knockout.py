"""A causal check: without the experts that a task favours, does that task lose more than the others do?"""

from collections.abc import Callable, Mapping

import numpy as np
from flax import nnx

from moe_lora_jax import MoeLoraParam


def favourites(shares: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{router: [task], the expert whose share on that task exceeds its mean share over tasks most}.

    Args:
        shares: {router: [task, expert]}, rows sum to 1.
    """
    return {router: np.argmax(share - share.mean(axis=0), axis=1) for router, share in shares.items()}


def without(state: nnx.State, experts: Mapping[str, int]) -> nnx.State:
    """The model's state with B = 0 for one expert of each router; the gates stay as they are.

    Args:
        state: of the whole model.
        experts: {router: expert}; a router's name is the path of its module or of its feed-forward block.
    """
    changed = []
    for path, variable in nnx.to_flat_state(state):
        if isinstance(variable, MoeLoraParam) and path[-1] == "lora_b":
            owner = ".".join(str(part) for part in path[:-1] if part != "base_layer")
            routers = [r for r in experts if owner == r or owner.startswith(f"{r}.")]
            for router in routers:
                variable = variable.replace(variable.get_value().at[experts[router]].set(0.0))
        changed.append((path, variable))
    return nnx.from_flat_state(changed)


def knockout_matrix(
    shares: Mapping[str, np.ndarray], loss: Callable[[Mapping[str, int] | None], np.ndarray], tasks: int
) -> np.ndarray:
    """[knocked task, scored task]: how much the loss grows without the first task's favourite experts.

    Args:
        shares: {router: [task, expert]}.
        loss: {router: expert to leave out} or None -> [task], nats.
        tasks: how many.
    """
    chosen, whole = favourites(shares), loss(None)
    return np.stack([loss({r: int(best[t]) for r, best in chosen.items()}) - whole for t in range(tasks)])


def own_and_others(matrix: np.ndarray, *, draws: int = 20000, seed: int = 0) -> tuple[float, float, float]:
    """Mean growth on the own task, mean on the others, and p of a permutation test.

    p is the part of the random pairings of knocked and scored tasks whose mean is at least that of the true pairing.
    """
    n = len(matrix)
    own = float(np.mean(np.diag(matrix)))
    others = float((matrix.sum() - np.trace(matrix)) / (n * n - n))
    random = np.random.default_rng(seed)
    means = [np.mean(matrix[np.arange(n), random.permutation(n)]) for _ in range(draws)]
    return own, others, float((1 + sum(m >= own - 1e-12 for m in means)) / (draws + 1))
