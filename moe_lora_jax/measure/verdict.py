"""What the statistics of the routers mean, in a sentence, and what to change."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.stuck_routers import stuck_routers
from moe_lora_jax.measure.router_statistics import RouterStatistics
from moe_lora_jax.train.health import DEAD_SHARE, ModuleHealth

NEARLY_COLLAPSED_SHARE = 0.8
ALIKE_ENTROPY = 0.99


@dataclass(frozen=True)
class Verdict:
    """word: healthy, collapsed, nearly collapsed, unused experts, undecided, or no verdict. finding: why, with the
    router, the expert and its share. change: what to try; empty where there is nothing.
    """

    word: str
    finding: str
    change: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.finding}" + (f". To change it: {self.change}" if self.change else "")


def verdict(
    statistics: RouterStatistics | str, config: MoeLoraConfig, *, learning_rate: float | None = None
) -> Verdict:
    """Judges the routers by what they did on data; the worst that is found counts.

    - collapsed: one expert takes nearly everything, or no more experts are alive than each token must use
      (`ModuleHealth.is_collapsed`).
    - nearly collapsed: one expert takes more than 80 %.
    - unused experts: some get less than 1 % of an even share.
    - undecided: in half of the routers or more a token's gates are alike, their entropy above 0.99 of the largest.

    Args:
        statistics: from `router_statistics`; a string says why there are none.
        config: of the adapter.
        learning_rate: of its training, if known.
    """
    if isinstance(statistics, str):
        return Verdict("no verdict", statistics.rstrip(".")[:1].lower() + statistics.rstrip(".")[1:])
    health = {m: ModuleHealth(shares, statistics.entropy[m]) for m, shares in statistics.shares.items()}
    top_k = {m: config.for_module(m).top_k for m in health}
    choosing = {m: state for m, state in health.items() if (top_k[m] or 1) < len(state.shares)}
    collapsed = {m: state for m, state in choosing.items() if state.is_collapsed(top_k[m])}
    if collapsed:
        return Verdict("collapsed", _taken(collapsed, health, "collapsed"), _spread_out(config, health, learning_rate))
    nearly = {m: state for m, state in choosing.items() if state.largest_share > NEARLY_COLLAPSED_SHARE}
    if nearly:
        finding = _taken(nearly, health, "nearly collapsed")
        return Verdict("nearly collapsed", finding, _spread_out(config, health, learning_rate))
    if dead := {m: state for m, state in health.items() if state.dead_experts}:
        total, experts = sum(s.dead_experts for s in dead.values()), sum(len(s.shares) for s in health.values())
        worst = max(dead, key=lambda m: dead[m].dead_experts)
        least = int(np.argmin(dead[worst].shares))
        finding = (
            f"{total} of {experts} experts get less than {100 * DEAD_SHARE:g} % of an even share, the most of them in "
            f"{worst}, where expert {least} gets {_percent(dead[worst].shares[least])} of the gate weight"
        )
        fewer = f"train with fewer experts (num_experts, found {config.num_experts})"
        return Verdict("unused experts", finding, f"{_balance(config)}, or {fewer}")
    alike = [m for m, state in health.items() if state.entropy > ALIKE_ENTROPY]
    if 2 * len(alike) >= len(health):
        mean = np.mean([health[m].entropy for m in alike])
        finding = (
            f"in {len(alike)} of {len(health)} routers, {alike[0]} for one, a token's gates are alike (entropy "
            f"{mean:.3f} of 1), so the experts act as one LoRA"
        )
        return Verdict("undecided", finding, _decide(config, learning_rate))
    largest = max(health, key=lambda m: health[m].largest_share)
    state = health[largest]
    finding = (
        f"every expert is used; the largest share of one is {_percent(state.largest_share)}, expert "
        f"{state.shares.argmax()} of {largest}, where even use is {100 / len(state.shares):.3g} %"
    )
    return Verdict("healthy", finding)


def _taken(found: Mapping[str, ModuleHealth], health: Mapping[str, ModuleHealth], word: str) -> str:
    worst = max(found, key=lambda m: found[m].largest_share)
    state = found[worst]
    text = f"expert {state.shares.argmax()} of {worst} gets {_percent(state.largest_share)} of the gate weight"
    if state.dead_experts:
        text += f", {state.dead_experts} of its {len(state.shares)} experts get next to nothing"
    return f"{text}; {len(found)} of {len(health)} routers {'is' if len(found) == 1 else 'are'} {word}"


def _spread_out(config: MoeLoraConfig, routers: Mapping[str, ModuleHealth], learning_rate: float | None) -> str:
    rate = "lower the learning rate" + ("" if learning_rate is None else f" (found {learning_rate:g})")
    changes = [_balance(config), rate]
    if stuck_routers(config, routers):
        changes.insert(0, "set top_k to 2 (found 1) or norm_topk_prob to false, because such a router has no gradient")
    elif config.top_k == 1:
        changes.append("set top_k to 2 (found 1)")
    return ", or ".join(changes)


def _balance(config: MoeLoraConfig) -> str:
    if config.router_aux_loss_coef == 0:
        return "set router_aux_loss_coef (found 0; 0.01 is a start)"
    return f"raise router_aux_loss_coef (found {config.router_aux_loss_coef:g})"


def _decide(config: MoeLoraConfig, learning_rate: float | None) -> str:
    found = "null, all experts" if config.top_k is None else str(config.top_k)
    rate = "" if learning_rate is None else f" (found {learning_rate:g})"
    changes = [f"set top_k below the number of experts (found {found})", f"raise the learning rate{rate}"]
    if config.router_aux_loss_coef > 0:
        changes.append(f"lower router_aux_loss_coef (found {config.router_aux_loss_coef:g})")
    return ", ".join([*changes, "or train for longer"])


def _percent(share: float) -> str:
    if share > 0.995:
        return "more than 99 %"
    return "less than 0.1 %" if share < 0.001 else f"{100 * share:.{0 if share >= 0.1 else 1}f} %"
