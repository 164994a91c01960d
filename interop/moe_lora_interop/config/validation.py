"""What every field of the config may be, and which fields do not go together."""

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

FORMAT_VERSION = 1
PEFT_TYPE = "MOE_LORA"
SCORING_FUNCS = ("softmax", "abs_softmax", "sigmoid")
SCOPES = ("linear", "ffn", "model")
ROUTER_INPUTS = ("hidden", "task")
MIXES = ("outputs", "weights")
AUX_LOSSES = ("switch", "mixtral", "localized")


def problems(config: Any) -> list[str]:
    """Everything wrong with a config's values, one line each; combinations only of fields that are right alone."""
    wrong = {
        name: f"{name}: found {value!r}, expected {allowed}"
        for name, (is_allowed, allowed) in FIELD_RULES.items()
        if not is_allowed(value := getattr(config, name))
    }
    together = [
        f"{fields[0]}: {message.format(c=config)}"
        for fields, clashes, message in COMBINATIONS
        if not wrong.keys() & set(fields) and clashes(config)
    ]
    return [*wrong.values(), *together]


LARGEST = 2**16  # of ranks, experts, sizes: beyond any use, and small enough that nothing built from it explodes


def _integer(low: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= LARGEST


def _number(is_in_range: Callable[[float], bool]) -> Callable[[Any], bool]:
    def check(v: Any) -> bool:
        is_number = isinstance(v, int | float) and not isinstance(v, bool)
        return is_number and abs(v) < 1e300 and math.isfinite(v) and is_in_range(v)

    return check


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and len(v) > 0 and all(check(x) for x in v)


def _either(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: any(check(v) for check in checks)


def _pattern_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, dict) and all(_is_regex(k) and check(x) for k, x in v.items())


def _is_regex(value: Any, form: str = "(.*\\.)?({})$") -> bool:
    """Whether it is a regular expression where PEFT puts it."""
    try:
        re.compile(form.format(value))
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return True


def _is_none(value: Any) -> bool:
    return value is None


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _one_of(values: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return (lambda v: isinstance(v, str) and v in values), f"one of {', '.join(values)}"


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


_names = _list_of(_is_name)
_name_patterns = _list_of(lambda v: _is_name(v) and _is_regex(v))
_rank = _either(_integer(1), _list_of(_integer(1)))
_positive = _number(lambda v: v > 0)
_alpha = _either(_positive, _list_of(_positive))
_top_k = _either(_is_none, _integer(1))
_fraction = _number(lambda v: 0 <= v < 1)
_coefficient = _number(lambda v: v >= 0)
_text = _either(_is_none, lambda v: isinstance(v, str))
_OPTIONAL_SIZE = (_either(_is_none, _integer(1)), "null or an integer >= 1")
_BOOL = (_is_bool, "true or false")
_TARGETS = (
    _either(_is_none, lambda v: _is_name(v) and _is_regex(v, "{}"), _names, lambda v: v == []),
    "null, a list of module names or a regular expression",
)
_FRACTION = (_fraction, "a number in [0, 1)")
_COEFFICIENT = (_coefficient, "a finite number >= 0")

FIELD_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_rank, "an integer >= 1, or a list of them, one per expert"),
    "lora_alpha": (_alpha, "a finite number > 0, or a list of them, one per expert"),
    "use_rslora": _BOOL,
    "num_experts": (_integer(1), "an integer >= 1"),
    "shared_lora_A": _BOOL,
    "target_modules": (_TARGETS[0], 'null, "all-linear", a list of module names or a regular expression'),
    "exclude_modules": _TARGETS,
    "layers_to_transform": (
        _either(_is_none, _integer(0), _list_of(_integer(0))),
        "null, a layer number or a list of layer numbers",
    ),
    "layers_pattern": (
        _either(_is_none, lambda v: _is_name(v) and _is_regex(v), _name_patterns),
        "null, a name or a list of names",
    ),
    "rank_pattern": (_pattern_of(_rank), "{regular expression: rank or list of ranks}"),
    "alpha_pattern": (_pattern_of(_alpha), "{regular expression: alpha or list of alphas}"),
    "num_experts_pattern": (_pattern_of(_integer(1)), "{regular expression: integer >= 1}"),
    "top_k_pattern": (_pattern_of(_top_k), "{regular expression: integer >= 1 or null}"),
    "init_lora_weights": _BOOL,
    "modules_to_save": (_either(_is_none, _name_patterns), "null or a list of module names"),
    "scope": _one_of(SCOPES),
    "router_input": _one_of(ROUTER_INPUTS),
    "router_depth": (_integer(0), "an integer >= 0"),
    "router_hidden_size": _OPTIONAL_SIZE,
    "num_tasks": _OPTIONAL_SIZE,
    "task_embedding_dim": _OPTIONAL_SIZE,
    "layerwise": _BOOL,
    "module_order": (_either(_is_none, _names), "null or a list of module paths"),
    "mix": _one_of(MIXES),
    "n_splits": (_integer(1), "an integer >= 1"),
    "router_bias": _BOOL,
    "scoring_func": _one_of(SCORING_FUNCS),
    "router_temperature": (_positive, "a finite number > 0"),
    "top_k": (_top_k, "null (dense) or an integer >= 1"),
    "threshold": (_either(_is_none, _number(lambda v: 0 < v <= 1)), "null or a number in (0, 1]"),
    "adaptive_threshold": _BOOL,
    "norm_topk_prob": _BOOL,
    "routed_scaling_factor": (_positive, "a finite number > 0"),
    "lora_dropout": _FRACTION,
    "expert_dropout": _FRACTION,
    "router_dropout": _FRACTION,
    "router_jitter_noise": _FRACTION,
    "router_aux_loss": _one_of(AUX_LOSSES),
    "router_aux_loss_delta": _FRACTION,
    "router_aux_loss_coef": _COEFFICIENT,
    "router_z_loss_coef": _COEFFICIENT,
    "format_version": (lambda v: v == FORMAT_VERSION and not isinstance(v, bool), f"{FORMAT_VERSION}"),
    "peft_type": (lambda v: v == PEFT_TYPE, PEFT_TYPE),
    "base_model_name_or_path": (_text, "null or a string"),
    "revision": (_text, "null or a string"),
    "task_type": (_text, "null or a string"),
    "inference_mode": _BOOL,
    "auto_mapping": (_either(_is_none, lambda v: isinstance(v, dict) and _is_json(v)), "null or a JSON object"),
    "peft_version": (_text, "null or a string"),
}


def _selects(c: Any) -> bool:
    return c.top_k is not None or any(k is not None for k in c.top_k_pattern.values())


def _lists(c: Any) -> Iterator[list]:
    return (v for v in (c.r, c.lora_alpha) if isinstance(v, list))


def _all_experts(c: Any) -> set[int]:
    """The numbers of experts of routed modules."""
    return {c.num_experts, *c.num_experts_pattern.values()} - {1}


# (fields, whether they clash, the message); checked only where every field named is right alone
COMBINATIONS: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
    (
        ("top_k", "num_experts"),
        lambda c: c.top_k is not None and c.top_k > c.num_experts,
        "found {c.top_k}, expected at most num_experts = {c.num_experts}",
    ),
    (
        ("r", "num_experts"),
        lambda c: isinstance(c.r, list) and len(c.r) != c.num_experts,
        "found the list {c.r}, expected num_experts = {c.num_experts} entries",
    ),
    (
        ("lora_alpha", "num_experts"),
        lambda c: isinstance(c.lora_alpha, list) and len(c.lora_alpha) != c.num_experts,
        "found the list {c.lora_alpha}, expected num_experts = {c.num_experts} entries",
    ),
    (
        ("threshold", "top_k", "top_k_pattern"),
        lambda c: c.threshold is not None and _selects(c),
        "found {c.threshold} together with top_k, expected only one way to select experts",
    ),
    (
        ("adaptive_threshold", "threshold"),
        lambda c: c.adaptive_threshold and c.threshold is None,
        "found true without threshold, expected threshold (its largest value)",
    ),
    (
        ("adaptive_threshold", "scope", "router_input", "mix"),
        lambda c: c.adaptive_threshold and (c.scope == "model" or c.router_input != "hidden" or c.mix != "outputs"),
        "found true, expected scope linear or ffn, router_input hidden and mix outputs with it",
    ),
    (
        ("norm_topk_prob", "scoring_func", "top_k", "top_k_pattern", "threshold"),
        lambda c: not c.norm_topk_prob and c.scoring_func != "sigmoid" and c.threshold is None and not _selects(c),
        "found false with a dense softmax, whose weights sum to 1 anyway; expected true, top_k or threshold",
    ),
    (
        ("layers_to_transform", "target_modules"),
        lambda c: isinstance(c.target_modules, str) and c.layers_to_transform is not None,
        "cannot be used when target_modules is a string, expected null",
    ),
    (
        ("layers_pattern", "target_modules"),
        lambda c: isinstance(c.target_modules, str) and c.layers_pattern is not None,
        "cannot be used when target_modules is a string, expected null",
    ),
    (
        ("layers_pattern", "layers_to_transform", "target_modules"),
        lambda c: not isinstance(c.target_modules, str) and bool(c.layers_pattern) and c.layers_to_transform is None,
        "found without layers_to_transform, expected both",
    ),
    (
        ("shared_lora_A", "r"),
        lambda c: c.shared_lora_A and isinstance(c.r, list) and len(set(c.r)) > 1,
        "found true with unequal ranks {c.r}, expected one rank",
    ),
    (
        ("layerwise", "scope", "router_input"),
        lambda c: c.layerwise and (c.scope != "model" or c.router_input != "hidden"),
        "found true with scope {c.scope} and router_input {c.router_input}, expected model and hidden",
    ),
    (
        ("module_order", "layerwise"),
        lambda c: c.module_order is not None and not c.layerwise,
        "found without layerwise, expected null",
    ),
    (
        ("router_depth", "scope"),
        lambda c: c.router_depth > 1 and c.scope != "model",
        "found {c.router_depth} in scope {c.scope}, expected 1: deep routers are for scope model",
    ),
    (
        ("router_hidden_size", "router_depth"),
        lambda c: (c.router_hidden_size is None) == (c.router_depth > 1),
        "found {c.router_hidden_size} with router_depth {c.router_depth}, expected a size if and only if depth > 1",
    ),
    (
        ("router_dropout", "router_depth"),
        lambda c: c.router_dropout > 0 and c.router_depth < 1,
        "found {c.router_dropout} with router_depth {c.router_depth}, expected 0: there are no layers",
    ),
    (
        ("num_tasks", "router_input"),
        lambda c: (c.num_tasks is None) == (c.router_input == "task"),
        "found {c.num_tasks} with router_input {c.router_input}, expected a number if and only if it is task",
    ),
    (
        ("task_embedding_dim", "router_input"),
        lambda c: c.task_embedding_dim is not None and c.router_input != "task",
        "found {c.task_embedding_dim} with router_input {c.router_input}, expected null",
    ),
    (
        ("router_depth", "task_embedding_dim", "router_input"),
        lambda c: (c.router_depth == 0) != (c.router_input == "task" and c.task_embedding_dim is None),
        "found {c.router_depth} with router_input {c.router_input} and task_embedding_dim {c.task_embedding_dim}, "
        "expected 0 if and only if a task table holds the logits",
    ),
    (
        ("router_input", "scope"),
        lambda c: c.router_input == "task" and c.scope == "ffn",
        "found task in scope ffn, expected scope linear or model",
    ),
    (
        ("task_embedding_dim", "scope"),
        lambda c: c.task_embedding_dim is not None and c.scope == "linear",
        "found {c.task_embedding_dim} in scope linear, expected scope model, or null (a table of logits)",
    ),
    (
        ("router_bias", "router_depth"),
        lambda c: c.router_bias and c.router_depth == 0,
        "found true with router_depth 0, expected false: a table has no bias",
    ),
    (
        ("router_jitter_noise", "router_input"),
        lambda c: c.router_jitter_noise > 0 and c.router_input == "task",
        "found {c.router_jitter_noise} with router_input task, expected 0",
    ),
    (
        ("router_aux_loss", "router_aux_loss_coef", "num_experts", "num_experts_pattern"),
        lambda c: (
            c.router_aux_loss == "localized" and c.router_aux_loss_coef > 0 and any(n % 2 for n in _all_experts(c))
        ),
        "found localized with {c.num_experts} experts, expected an even number: its two halves are pulled apart",
    ),
    (
        ("router_aux_loss", "num_experts_pattern"),
        lambda c: c.router_aux_loss == "mixtral" and len(_all_experts(c)) > 1,
        "found mixtral with num_experts that differ by module, expected one number: their tokens are pooled",
    ),
    (
        ("router_aux_loss_delta", "router_aux_loss"),
        lambda c: c.router_aux_loss_delta > 0 and c.router_aux_loss != "localized",
        "found {c.router_aux_loss_delta} with router_aux_loss {c.router_aux_loss}, expected 0",
    ),
    (
        ("top_k_pattern", "scope"),
        lambda c: bool(c.top_k_pattern) and c.scope == "model",
        "found {c.top_k_pattern} in scope model, expected none: one router decides for all modules",
    ),
    (
        ("n_splits", "mix"),
        lambda c: c.n_splits > 1 and c.mix != "weights",
        "found {c.n_splits} with mix {c.mix}, expected 1",
    ),
    (
        ("n_splits", "layerwise"),
        lambda c: c.n_splits > 1 and c.layerwise,
        "found {c.n_splits} with layerwise, expected 1",
    ),
    (
        ("mix", "scope", "shared_lora_A", "r", "lora_alpha"),
        lambda c: (
            c.mix == "weights" and (c.scope == "ffn" or c.shared_lora_A or any(len(set(v)) > 1 for v in _lists(c)))
        ),
        "found weights with scope {c.scope}, shared_lora_A {c.shared_lora_A}, r {c.r}, lora_alpha {c.lora_alpha}; "
        "expected scope linear or model, an A per expert, one rank and one alpha",
    ),
]
