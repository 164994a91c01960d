"""The one routing rule that cannot be trained, and the one place that says so."""

import warnings
from collections.abc import Iterable

from moe_lora_interop.config.adapter_config import MoeLoraConfig


def stuck_routers(config: MoeLoraConfig, modules: Iterable[str]) -> list[str]:
    """Those of `modules` whose router is renormalised top-1: its only gate is always 1, whatever the logits are."""
    if not config.norm_topk_prob or config.adaptive_threshold:
        return []
    sizes = {m: config.for_module(m) for m in modules}
    return [m for m, s in sizes.items() if s.has_router and s.top_k == 1]


def warn_of_stuck_routers(config: MoeLoraConfig, modules: Iterable[str]) -> None:
    """For whoever applies `config` to these modules in order to train.

    Warns:
        UserWarning: once for all of them; Python shows a repetition of the same words only once.
    """
    if stuck := stuck_routers(config, modules):
        warnings.warn(
            f"{len(stuck)} routers ({stuck[0]}, ...) have top_k=1 and norm_topk_prob=True: their gate is always 1, so "
            "the language-model loss gives them no gradient and they cannot learn; use top_k=2 or norm_topk_prob=False",
            UserWarning,
            stacklevel=1,  # here, wherever it is asked from: so that Python notices the repetition
        )
