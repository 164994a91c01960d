"""The adapters that are compared. All but `lora_r` have as many trainable parameters as `lora`, within 2 %.

The scaling is lora_alpha / r = 2 everywhere, and all linear layers of SmolLM2-135M are adapted. Ranks are chosen for
equal parameters on that model (tests/test_effect.py counts them).
"""

from moe_lora_interop.config.adapter_config import MoeLoraConfig

EXPERTS, RANK = 8, 4
BALANCE = 0.01  # Switch Transformer's coefficient


def _mixture(**fields: object) -> MoeLoraConfig:
    values = {"r": RANK, "lora_alpha": 2 * RANK, "num_experts": EXPERTS, "target_modules": "all-linear", **fields}
    return MoeLoraConfig(**values)  # type: ignore[arg-type]


def _mixlora(**fields: object) -> MoeLoraConfig:
    """Feed-forward experts, and plain LoRA in the attention, as published (arXiv:2404.15159)."""
    attention = r".*self_attn\..*"
    return MoeLoraConfig.preset(
        "mixlora",
        r=6,
        lora_alpha=12,
        num_experts=EXPERTS,
        target_modules="all-linear",
        rank_pattern={attention: 15},
        alpha_pattern={attention: 30},
        **fields,
    )


def _hydralora(**fields: object) -> MoeLoraConfig:
    """One A and three B, as in its paper (arXiv:2404.19245)."""
    values = {"r": 17, "lora_alpha": 34, "num_experts": 3, "target_modules": "all-linear", **fields}
    return MoeLoraConfig.preset("hydralora", **values)


METHODS: dict[str, MoeLoraConfig] = {
    "lora": _mixture(num_experts=1, r=36, lora_alpha=72),  # EXPERTS * RANK, and the routers' parameters
    "top2_balanced": _mixture(top_k=2, router_aux_loss_coef=BALANCE),
    "dense": _mixture(),
    "mixlora_balanced": _mixlora(),
    "hydralora": _hydralora(),
    "lora_r": _mixture(num_experts=1),
    "top2": _mixture(top_k=2),
    "mixlora": _mixlora(router_aux_loss_coef=0.0),
    "dense_balanced": _mixture(router_aux_loss_coef=BALANCE),
    "hydralora_balanced": _hydralora(router_aux_loss_coef=BALANCE),
}
