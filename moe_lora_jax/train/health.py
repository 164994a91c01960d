"""Router health: is every expert used, and does any module's routing collapse onto a few of them?"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_jax.layers.gating import RouterOutput
from moe_lora_jax.layers.router_outputs import alike

logger = logging.getLogger(__name__)

DEAD_SHARE = 0.01  # of the share that equal use would give
COLLAPSED_SHARE = 0.95


class RouterSums(NamedTuple):
    """One module's sums over some tokens, which add up over batches. On the device, from inside the step.

    gates: [expert], sum of the gates without their signs, each token's divided by their sum.
    entropy: sum over tokens of -sum_e g log g, nats.
    tokens: how many.
    """

    gates: jax.Array
    entropy: jax.Array
    tokens: jax.Array


def gate_shares(gates: jax.Array) -> jax.Array:
    """A token's gates without their signs, divided by their sum: [..., expert]; 0 where no expert is kept."""
    gates = jnp.abs(gates)
    total = jnp.sum(gates, axis=-1, keepdims=True)
    return gates / jnp.where(total > 0, total, 1.0)


def router_sums(router: Mapping[str, RouterOutput], mask: jax.Array) -> dict[str, RouterSums]:
    """The statistics of one batch, per module; a split counts like a token of its own.

    Args:
        router: {module path: RouterOutput, fields [batch, seq, expert] or [batch, seq, split, expert]}.
        mask: [batch, seq], nonzero for the tokens to look at; usually the attention mask.
    """

    def of_module(gates: jax.Array) -> RouterSums:
        gates = gates.reshape(*mask.shape, -1, gates.shape[-1])
        real = jnp.broadcast_to((mask > 0)[..., None], gates.shape[:-1]).astype(jnp.float32)
        share = jax.lax.stop_gradient(gate_shares(gates))
        entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0), axis=-1)
        return RouterSums(jnp.tensordot(real, share, axes=3), jnp.sum(entropy * real), jnp.sum(real))

    sums = {}
    for _, modules, out in alike(router):
        found = jax.vmap(of_module)(out.gates)
        sums.update({module: jax.tree.map(lambda x, n=n: x[n], found) for n, module in enumerate(modules)})
    return {module: sums[module] for module in router}


@dataclass(frozen=True)
class ModuleHealth:
    """What one router did over some tokens.

    shares: [expert], part of the gate weight that each expert received; sums to 1.
    entropy: mean entropy of a token's gates divided by log E: 0 is one expert per token, 1 is all equally.
    """

    shares: np.ndarray
    entropy: float

    @property
    def largest_share(self) -> float:
        return float(self.shares.max())

    @property
    def dead_experts(self) -> int:
        """Experts that received less than DEAD_SHARE of an equal share."""
        return int(np.sum(self.shares < DEAD_SHARE / len(self.shares)))

    def is_collapsed(self, top_k: int | None) -> bool:
        """One expert takes nearly everything, or no more experts than each token must use are alive."""
        experts, needed = len(self.shares), top_k or 1
        return needed < experts and (self.largest_share > COLLAPSED_SHARE or self.dead_experts >= experts - needed)

    def to_dict(self) -> dict[str, Any]:
        return {
            "entropy": round(self.entropy, 4),
            "largest_share": round(self.largest_share, 4),
            "dead_experts": self.dead_experts,
        }


def module_health(sums: Mapping[str, RouterSums]) -> dict[str, ModuleHealth]:
    """Host-side means of the sums."""
    result = {}
    for module, (gates, entropy, tokens) in sums.items():
        weight = np.asarray(gates, np.float64)
        experts, total = len(weight), max(float(weight.sum()), 1e-12)
        result[module] = ModuleHealth(weight / total, float(entropy) / max(float(tokens), 1.0) / np.log(experts))
    return result


def summary(health: Mapping[str, ModuleHealth]) -> dict[str, float | int]:
    """Over all routed modules: mean entropy, largest share anywhere, dead experts in all."""
    if not health:
        return {}
    states = health.values()
    return {
        "router_entropy": round(sum(s.entropy for s in states) / len(health), 4),
        "router_largest_share": round(max(s.largest_share for s in states), 4),
        "router_dead_experts": sum(s.dead_experts for s in states),
    }


class CollapseWatch:
    """Warns once per module, in one line through `logging`, when its routing has collapsed over a window of steps."""

    def __init__(self, config: MoeLoraConfig | None):
        self.config = config
        self.warned: set[str] = set()

    def check(self, step: int, health: Mapping[str, ModuleHealth]) -> None:
        """Looks at the health over the window that ends with `step`."""
        if self.config is None:
            return
        new = [
            module
            for module, state in health.items()
            if module not in self.warned and state.is_collapsed(self.config.for_module(module).top_k)
        ]
        if not new:
            return
        self.warned.update(new)
        worst = max(new, key=lambda m: health[m].largest_share)
        logger.warning(
            "step %d: routing collapsed in %d of %d modules (worst: %s, one expert takes %.0f%%, %d of %d are dead); "
            "raise router_aux_loss_coef or lower the learning rate",
            step,
            len(new),
            len(health),
            worst,
            100 * health[worst].largest_share,
            health[worst].dead_experts,
            len(health[worst].shares),
        )
