"""Which values of the config's fields do not go together.

A rule takes the fields that it is about, by their names, and gives what is wrong, or nothing; the first one is blamed.
"""

from collections.abc import Callable, Mapping
from typing import Any

from moe_lora_interop.config.routing_rule import refuses_top_k

REPLACED = {
    "scoring_func": "softmax",
    "threshold": None,
    "adaptive_threshold": False,
    "top_p": None,
    "entropy_threshold": None,
    "entropy_index": 1,
    "entropy_eps": 0,
    "norm_topk_prob": True,
}
"""What a registered routing stands for, with the defaults."""


def clashes(right: Mapping[str, Any]) -> list[str]:
    """What is wrong, one line for each rule.

    Args:
        right: {field: value} of those that are right alone; rules about others do not apply.
    """
    found = []
    for rule in COMBINATIONS:
        fields = rule.__code__.co_varnames[: rule.__code__.co_argcount]
        if right.keys() >= set(fields) and (problem := rule(*(right[field] for field in fields))):
            found.append(f"{fields[0]}: {problem}")
    return found


def _wrong_length(values: Any, num_experts: int) -> str | None:
    if not isinstance(values, list) or len(values) == num_experts:
        return None
    return f"found the list {values}, expected num_experts = {num_experts} entries"


def _beside_a_string(value: Any, target_modules: Any) -> str | None:
    if value is None or not isinstance(target_modules, str):
        return None
    return f"found {value!r} while target_modules is a string, expected null"


def _selects(top_k: int | None, top_k_pattern: Mapping[str, int | None]) -> bool:
    return top_k is not None or any(k is not None for k in top_k_pattern.values())


def _without_floor(value: float | None, top_k: int | None, top_k_pattern: Mapping[str, int | None]) -> str | None:
    if value is None or (top_k is not None and None not in top_k_pattern.values()):
        return None
    return f"found {value} without top_k, expected it for every module: the fewest experts that are kept"


def _of_no_softmax(value: float | None, scoring_func: str) -> str | None:
    if value is None or "softmax" in scoring_func:
        return None
    return f"found {value} with scoring_func {scoring_func}, expected null or a softmax: it is one of probabilities"


def _differ(value: Any) -> bool:
    return isinstance(value, list) and len(set(value)) > 1


def _of_routed(num_experts: int, num_experts_pattern: Mapping[str, int]) -> set[int]:
    """The numbers of experts of modules with a router."""
    return {num_experts, *num_experts_pattern.values()} - {1}


def _beside_what_it_replaces(
    routing: Any,
    scoring_func: str,
    threshold: float | None,
    adaptive_threshold: bool,
    top_p: float | None,
    entropy_threshold: float | None,
    entropy_index: float,
    entropy_eps: float,
    norm_topk_prob: bool,
) -> str | None:
    found = {k: v for k, v in locals().items() if k in REPLACED and v != REPLACED[k]}
    if routing is None or not found:
        return None
    words = ", ".join(f"{k} {v}" for k, v in found.items())
    return f"found together with {words}, which it replaces; expected {', '.join(found)} at the default"


COMBINATIONS: tuple[Callable[..., Any], ...] = (
    # experts and how they are selected
    lambda top_k, num_experts: (
        (top_k is not None and top_k > num_experts) and f"found {top_k}, expected at most num_experts = {num_experts}"
    ),
    lambda r, num_experts: _wrong_length(r, num_experts),
    lambda lora_alpha, num_experts: _wrong_length(lora_alpha, num_experts),
    lambda threshold, top_k, top_k_pattern: (
        (threshold is not None and _selects(top_k, top_k_pattern))
        and f"found {threshold} together with top_k, expected only one way to select experts"
    ),
    lambda adaptive_threshold, threshold: (
        (adaptive_threshold and threshold is None)
        and "found true without threshold, expected threshold (its largest value)"
    ),
    lambda adaptive_threshold, scope, router_input, mix: (
        (adaptive_threshold and (scope == "model" or router_input != "hidden" or mix != "outputs"))
        and "found true, expected scope linear or ffn, router_input hidden and mix outputs with it"
    ),
    lambda norm_topk_prob, scoring_func: (
        (norm_topk_prob and scoring_func == "identity")
        and "found true with scoring_func identity, expected false: signed scores are not divided by their sum"
    ),
    lambda threshold, scoring_func: (
        (threshold is not None and scoring_func == "identity")
        and f"found {threshold} with scoring_func identity, expected null or another score: it is one of probabilities"
    ),
    lambda top_p, top_k, top_k_pattern: _without_floor(top_p, top_k, top_k_pattern),
    lambda entropy_threshold, top_k, top_k_pattern: _without_floor(entropy_threshold, top_k, top_k_pattern),
    lambda top_p, scoring_func: _of_no_softmax(top_p, scoring_func),
    lambda entropy_threshold, scoring_func: _of_no_softmax(entropy_threshold, scoring_func),
    lambda router_aux_loss_coef, scoring_func: (
        (router_aux_loss_coef > 0 and scoring_func == "identity")
        and f"found {router_aux_loss_coef} with scoring_func identity, expected 0: signed scores are no probabilities"
    ),
    lambda norm_topk_prob, scoring_func, threshold, top_k, top_k_pattern: (
        (not norm_topk_prob and scoring_func not in ("sigmoid", "identity") and threshold is None)
        and not _selects(top_k, top_k_pattern)
        and "found false with a dense softmax or sparsemax, whose weights sum to 1 anyway; expected true, top_k or "
        "threshold"
    ),
    _beside_what_it_replaces,
    lambda top_k, top_k_pattern, routing: (
        (_selects(top_k, top_k_pattern) and refuses_top_k(routing))
        and f"found {top_k}, {top_k_pattern} by module, with a routing that takes no top_k; expected null"
    ),
    # target modules
    lambda layers_to_transform, target_modules: _beside_a_string(layers_to_transform, target_modules),
    lambda layers_pattern, target_modules: _beside_a_string(layers_pattern, target_modules),
    lambda layers_pattern, layers_to_transform, target_modules: (
        (layers_pattern is not None and layers_to_transform is None and not isinstance(target_modules, str))
        and f"found {layers_pattern!r} without layers_to_transform, expected both"
    ),
    lambda shared_lora_A, r: (shared_lora_A and _differ(r)) and f"found true with unequal ranks {r}, expected one rank",
    # routers
    lambda layerwise, scope, router_input: (
        (layerwise and (scope != "model" or router_input != "hidden"))
        and f"found true with scope {scope} and router_input {router_input}, expected model and hidden"
    ),
    lambda module_order, layerwise: (
        (module_order is not None and not layerwise) and "found without layerwise, expected null"
    ),
    lambda scaling_pass_value, scope, router_input: (
        (scaling_pass_value != 0 and (scope != "model" or router_input != "hidden"))
        and f"found {scaling_pass_value} with scope {scope} and router_input {router_input}, expected 0: no first pass"
    ),
    lambda scaling_pass_value, top_k: (
        (scaling_pass_value != 0 and top_k is not None)
        and f"found {scaling_pass_value} together with top_k, expected 0 or no top_k: of equal gates any k may be kept"
    ),
    lambda scaling_pass_value, num_experts, num_experts_pattern: (
        (scaling_pass_value != 0 and (num_experts == 1 or 1 in num_experts_pattern.values()))
        and f"found {scaling_pass_value} with modules of one expert, which have no gate; expected 0"
    ),
    lambda router_depth, scope: (
        (router_depth > 1 and scope != "model")
        and f"found {router_depth} in scope {scope}, expected 1: deep routers are for scope model"
    ),
    lambda router_hidden_size, router_depth: (
        (router_hidden_size is None) == (router_depth > 1)
        and f"found {router_hidden_size} with router_depth {router_depth}, expected a size if and only if depth > 1"
    ),
    lambda temperature_hidden_size, scope, router_input: (
        (temperature_hidden_size is not None and (scope == "model" or router_input != "hidden"))
        and f"found {temperature_hidden_size} with scope {scope} and router_input {router_input}, expected scope "
        "linear or ffn and router_input hidden with it"
    ),
    lambda router_dropout, router_depth: (
        (router_dropout > 0 and router_depth < 1)
        and f"found {router_dropout} with router_depth {router_depth}, expected 0: there are no layers"
    ),
    lambda router_input, scope, mix, r: (
        (router_input == "expert_activations" and (scope != "linear" or mix != "outputs" or _differ(r)))
        and f"found expert_activations with scope {scope}, mix {mix}, r {r}; expected scope linear, mix outputs, "
        "one rank"
    ),
    # tasks
    lambda num_tasks, router_input: (
        (num_tasks is None) == (router_input == "task")
        and f"found {num_tasks} with router_input {router_input}, expected a number if and only if it is task"
    ),
    lambda task_embedding_dim, router_input: (
        (task_embedding_dim is not None and router_input != "task")
        and f"found {task_embedding_dim} with router_input {router_input}, expected null"
    ),
    lambda router_depth, task_embedding_dim, router_input: (
        (router_depth == 0) != (router_input == "task" and task_embedding_dim is None)
        and f"found {router_depth} with router_input {router_input} and task_embedding_dim {task_embedding_dim}, "
        "expected 0 if and only if a task table holds the logits"
    ),
    lambda router_input, scope: (
        (router_input == "task" and scope == "ffn") and "found task in scope ffn, expected scope linear or model"
    ),
    lambda task_embedding_dim, scope: (
        (task_embedding_dim is not None and scope == "linear")
        and f"found {task_embedding_dim} in scope linear, expected scope model, or null (a table of logits)"
    ),
    lambda router_bias, router_depth: (
        (router_bias and router_depth == 0) and "found true with router_depth 0, expected false: a table has no bias"
    ),
    lambda router_jitter_noise, router_input: (
        (router_jitter_noise > 0 and router_input == "task")
        and f"found {router_jitter_noise} with router_input task, expected 0"
    ),
    # balancing
    lambda router_aux_loss, router_aux_loss_coef, num_experts, num_experts_pattern: (
        (router_aux_loss == "localized" and router_aux_loss_coef > 0)
        and any(n % 2 for n in _of_routed(num_experts, num_experts_pattern))
        and f"found localized with {num_experts} experts, expected an even number: its two halves are pulled apart"
    ),
    lambda router_aux_loss, num_experts, num_experts_pattern: (
        (router_aux_loss == "mixtral" and len(_of_routed(num_experts, num_experts_pattern)) > 1)
        and "found mixtral with num_experts that differ by module, expected one number: their tokens are pooled"
    ),
    lambda router_aux_loss_delta, router_aux_loss: (
        (router_aux_loss_delta > 0 and router_aux_loss != "localized")
        and f"found {router_aux_loss_delta} with router_aux_loss {router_aux_loss}, expected 0"
    ),
    # one router for all modules, and weights that are mixed
    lambda top_k_pattern, scope: (
        (top_k_pattern and scope == "model")
        and f"found {top_k_pattern} in scope model, expected none: one router decides for all modules"
    ),
    lambda n_splits, mix: (n_splits > 1 and mix != "weights") and f"found {n_splits} with mix {mix}, expected 1",
    lambda n_splits, layerwise: (n_splits > 1 and layerwise) and f"found {n_splits} with layerwise, expected 1",
    lambda mix, scope, shared_lora_A, r, lora_alpha: (
        (mix == "weights" and (scope == "ffn" or shared_lora_A or _differ(r) or _differ(lora_alpha)))
        and f"found weights with scope {scope}, shared_lora_A {shared_lora_A}, r {r}, lora_alpha {lora_alpha}; "
        "expected scope linear or model, an A per expert, one rank and one alpha"
    ),
)
