"""The gate function in plain numpy, as the formula in `moe_lora_interop.config` says it; and the gates of a task."""

from collections.abc import Sequence

import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.routing_rule import decision
from moe_lora_interop.errors import ConfigError


def compute_gates(
    logits: np.ndarray, config: MoeLoraConfig, top_k: int | None = None, tau: np.ndarray | None = None
) -> np.ndarray:
    """Weights g of the experts, times routed_scaling_factor: [..., expert], from logits z: [..., expert].

        p = softmax(z) | softmax(|z|) | sigmoid(z) | z | sparsemax(z)
        kept: all | the top_k largest p | p >= tau; with top_p and entropy_threshold more, as the config says
        g = p (minus tau if adaptive) where kept, else 0; divided by its sum if norm_topk_prob

    Args:
        logits: already divided by the temperature.
        config: the rule; its own top_k is not looked at, as modules may differ.
        top_k: experts kept; of equal ones the first. None keeps all.
        tau: threshold on p that broadcasts to `logits`; None is config.threshold.

    Raises:
        ConfigError: a registered routing without a function for numpy, or one that keeps more than top_k.
    """
    if config.routing_rule is not None:
        _, gates = decision(config.routing_rule, "numpy", logits, top_k)
        if top_k is not None and (most := np.count_nonzero(gates, axis=-1).max(initial=0)) > top_k:
            raise ConfigError(
                "no gates", [f"routing: keeps {most} experts of a token, expected at most top_k = {top_k}"]
            )
        return gates * config.routed_scaling_factor
    z = np.abs(logits) if config.scoring_func == "abs_softmax" else logits
    if config.scoring_func == "sigmoid":
        score = np.exp(-np.logaddexp(0.0, -z))
    elif config.scoring_func == "identity":
        score = z
    elif config.scoring_func == "sparsemax":
        score = _sparsemax(z)
    else:
        exponential = np.exp(z - z.max(axis=-1, keepdims=True))
        score = exponential / exponential.sum(axis=-1, keepdims=True)
    keep = np.ones(z.shape, bool)
    if top_k is not None:
        keep[:] = False
        np.put_along_axis(keep, np.argsort(-z, axis=-1, kind="stable")[..., :top_k], True, axis=-1)
        keep |= _further(score, config)
    threshold = config.threshold if tau is None else tau
    if threshold is not None:
        keep &= score >= threshold
    kept = score - threshold if config.adaptive_threshold and threshold is not None else score
    weights = np.where(keep, kept, 0.0)
    if config.norm_topk_prob and config.scoring_func == "sigmoid" and not config.adaptive_threshold:
        log_p = np.where(keep, -np.logaddexp(0.0, -z), -np.inf)  # all p may be too small for a float
        largest = log_p.max(axis=-1, keepdims=True)
        weights = np.exp(log_p - np.where(np.isfinite(largest), largest, 0.0))
    if config.norm_topk_prob:
        total = weights.sum(axis=-1, keepdims=True)
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return weights * config.routed_scaling_factor


def _sparsemax(z: np.ndarray) -> np.ndarray:
    """max(z - t, 0), t such that the sum is 1: expert i is above t if sum_j max(z_j - z_i, 0) < 1."""
    above = np.maximum(z[..., None, :] - z[..., None], 0).sum(axis=-1) < 1
    t = ((z * above).sum(axis=-1, keepdims=True) - 1) / above.sum(axis=-1, keepdims=True)
    return np.maximum(z - t, 0)


def _further(p: np.ndarray, config: MoeLoraConfig) -> np.ndarray:
    """The experts that top_p and entropy_threshold keep beside the largest."""
    more = np.zeros(p.shape, bool)
    if config.top_p is not None:
        order = np.argsort(-p, axis=-1, kind="stable")
        within = np.cumsum(np.take_along_axis(p, order, -1), axis=-1) <= config.top_p
        np.put_along_axis(more, order, within, axis=-1)
    if config.entropy_threshold is not None:
        q, shifted, experts = config.entropy_index, p + config.entropy_eps, p.shape[-1]
        if q == 1:
            logs = np.log(shifted, out=np.zeros_like(shifted), where=shifted > 0)
            entropy = -(shifted * logs).sum(axis=-1, keepdims=True) / np.log(experts)
        else:
            entropy = (1 - (shifted**q).sum(axis=-1, keepdims=True)) / (1 - experts ** (1 - q))
        more |= entropy > config.entropy_threshold
    return more


def task_gates(adapter: Adapter, task_ids: Sequence[int]) -> dict[str, np.ndarray]:
    """The gates of every routed module for one task, from the stored router: {module: [split, expert]} float64.

    Args:
        adapter: one with router_input "task".
        task_ids: one id; or several, whose rows of the table are averaged over ids > 0 (MOELoRA's rule).

    Raises:
        ConfigError: the adapter does not route by task, or an id is not in its table.
    """
    config = adapter.config
    if config.router_input != "task":
        problem = f"task: the gates depend on the input (router_input {config.router_input}), not on a task"
        raise ConfigError("no gates for a task", [problem])
    assert config.num_tasks is not None, "the config requires it"
    wrong = [
        f"task: found {i}, expected an id from 0 to {config.num_tasks - 1}"
        for i in task_ids
        if not 0 <= i < config.num_tasks
    ]
    if wrong or not task_ids:
        raise ConfigError("no gates for a task", wrong or ["task: found no id, expected at least one"])
    if config.scope == "model":
        logits = _mlp(adapter, _row(adapter, "", task_ids))
        return {m: _gates_of(adapter, m, logits) for m in adapter.routed}
    return {m: _gates_of(adapter, m, _row(adapter, m, task_ids)) for m in adapter.routed}


def _row(adapter: Adapter, owner: str, task_ids: Sequence[int]) -> np.ndarray:
    table = np.asarray(adapter.tensors[owner, "task_embedding"], np.float64)
    if len(task_ids) == 1:
        return table[task_ids[0]]
    given = [i for i in task_ids if i > 0]
    return table[given].sum(axis=0) / max(len(given), 1)


def _mlp(adapter: Adapter, x: np.ndarray) -> np.ndarray:
    for j in range(adapter.config.router_depth):
        x = np.maximum(x, 0.0) if j else x
        x = np.asarray(adapter.tensors["", f"router_{j}"], np.float64) @ x
        if adapter.config.router_bias:
            x = x + np.asarray(adapter.tensors["", f"router_bias_{j}"], np.float64)
    return x


def _gates_of(adapter: Adapter, module: str, logits: np.ndarray) -> np.ndarray:
    config, sizes = adapter.config, adapter.config.for_module(module)
    z = logits.reshape(config.n_splits, sizes.num_experts) / config.router_temperature
    return compute_gates(z, config, sizes.top_k)
