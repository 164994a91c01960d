"""The one routing rule that cannot be trained, renormalised top-1, and the warning of it."""

import warnings
from collections.abc import Iterable

from moe_lora_interop.config.adapter_config import MoeLoraConfig


def stuck_routers(config: MoeLoraConfig, modules: Iterable[str]) -> list[str]:
    """Those of `modules` whose router keeps one expert and renormalises: its gate is always 1, whatever the logits."""
    if not config.norm_topk_prob or config.adaptive_threshold or config.routing is not None:
        return []
    return [m for m, sizes in config.for_modules(modules).items() if sizes.has_router and sizes.most_kept == 1]


def warn_of_stuck_routers(config: MoeLoraConfig, modules: Iterable[str]) -> None:
    """For whoever applies `config` to these modules in order to train.

    Warns:
        UserWarning: one for all of them.
    """
    if stuck := stuck_routers(config, modules):
        warnings.warn(
            f"{len(stuck)} routers ({stuck[0]}, ...) have top_k=1 and norm_topk_prob=True: their gate is always 1, so "
            "the language-model loss gives them no gradient and they cannot learn; use top_k=2 or norm_topk_prob=False",
            UserWarning,
            stacklevel=1,  # this line, whoever calls: Python then shows the same words only once
        )
