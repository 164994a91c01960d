"""A routing rule in words."""

from typing import Any, Protocol

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.routing_rule import rule_in_words


class GatesRule(Protocol):
    """How gates follow from logits: the fields for it, which a config has, and the routing of one layer too."""

    @property
    def scoring_func(self) -> str: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def threshold(self) -> float | None: ...
    @property
    def adaptive_threshold(self) -> bool: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def entropy_threshold(self) -> float | None: ...
    @property
    def entropy_index(self) -> float: ...
    @property
    def entropy_eps(self) -> float: ...
    @property
    def norm_topk_prob(self) -> bool: ...
    @property
    def routed_scaling_factor(self) -> float: ...
    @property
    def routing_rule(self) -> Any: ...


def routing_in_words(config: MoeLoraConfig) -> str:
    """The routing rule of a config in one line, from the router's input to the gates."""
    if config.num_experts == 1 and not config.num_experts_pattern:
        return "none, one expert (plain LoRA)"
    logits = "R relu(A x)" if config.router_input == "expert_activations" else "R x"
    logits = f"{logits} + b" if config.router_bias else logits
    if config.temperature_hidden_size is not None:
        logits = f"({logits}) / T, T = {config.router_temperature:g} + softplus(-MLP(x))"
    elif config.router_temperature != 1:
        logits = f"({logits}) / {config.router_temperature:g}"
    if config.scaling_pass_value:
        logits += f", x from a first pass with every gate {config.scaling_pass_value:g}"
    by_module = f" (top_k per module: {config.top_k_pattern})" if config.top_k_pattern else ""
    return f"z = {logits}, {gates_in_words(config, by_module)}"


def gates_in_words(rule: GatesRule, by_module: str = "") -> str:
    """From logits z to gates in one line.

    Args:
        by_module: added to what is kept, where that differs by module.
    """
    factor = "" if rule.routed_scaling_factor == 1 else f", times {rule.routed_scaling_factor:g}"
    if rule.routing_rule is not None:
        return f"gates by {rule_in_words(rule.routing_rule, rule.top_k)}{by_module}{factor}"
    scores = {"abs_softmax": "softmax(|z|)", "identity": "z"}.get(rule.scoring_func, f"{rule.scoring_func}(z)")
    if rule.top_k is not None:
        kept = f"the {rule.top_k} largest"
    elif rule.adaptive_threshold:
        kept = f"those with p >= tau = {rule.threshold:g} * sigmoid(w.x + c), tau subtracted"
    elif rule.threshold is not None:
        kept = f"those with p >= {rule.threshold:g}"
    else:
        kept = "all"
    if rule.top_p is not None:
        kept += f" and more while their sum is at most {rule.top_p:g}"
    if rule.entropy_threshold is not None:
        eps = f" of p + {rule.entropy_eps:g}" if rule.entropy_eps else ""
        kept += f", all where the entropy H_{rule.entropy_index:g}{eps} is above {rule.entropy_threshold:g}"
    norm = ", divided by their sum" if rule.norm_topk_prob else ", not renormalised"
    return f"p = {scores}, keep {kept}{by_module}{norm}{factor}"
