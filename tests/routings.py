"""Routings of somebody else, for tests: one that is softmax and top-k once more, and one that no field can say."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch

from moe_lora_interop import register_routing


@register_routing("again")
@dataclass(frozen=True)
class Again:
    """What the defaults say, with top_k or without: softmax, of equal logits the first, divided by their sum."""

    def jax(self, z, top_k):
        p = jax.nn.softmax(z)
        kept = jnp.argsort(jnp.argsort(-z, axis=-1, stable=True), axis=-1) < (top_k or z.shape[-1])
        return p, jax.nn.softmax(jnp.where(kept, z, -jnp.inf))

    def torch(self, z, top_k):
        kept = (-z).argsort(dim=-1, stable=True).argsort(-1) < (top_k or z.shape[-1])
        return z.softmax(-1), z.masked_fill(~kept, -torch.inf).softmax(-1)

    def numpy(self, z, top_k):
        kept = (-z).argsort(-1, kind="stable").argsort(-1) < (top_k or z.shape[-1])
        p = np.exp(z - z.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True), p * kept / (p * kept).sum(-1, keepdims=True)


@register_routing("signed_root", version=2)
@dataclass(frozen=True)
class SignedRoot:
    """g = power z / (1 + sqrt(1 + |z|)), divided by E if `spread`, of the top_k largest |z|; scores softmax(z)."""

    power: float = 1.0
    spread: bool = True
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        if self.power <= 0:
            raise ValueError(f"power: found {self.power}, expected > 0")

    def jax(self, z, top_k):
        size = jnp.abs(z)
        kept = jnp.argsort(jnp.argsort(-size, axis=-1, stable=True), axis=-1) < (top_k or z.shape[-1])
        gates = self.power * z / (1 + jnp.sqrt(1 + size)) / (z.shape[-1] if self.spread else 1)
        return jax.nn.softmax(z), jnp.where(kept, gates, 0.0)

    def torch(self, z, top_k):
        kept = (-z.abs()).argsort(dim=-1, stable=True).argsort(-1) < (top_k or z.shape[-1])
        gates = self.power * z / (1 + (1 + z.abs()).sqrt()) / (z.shape[-1] if self.spread else 1)
        return z.softmax(-1), torch.where(kept, gates, 0.0)

    def numpy(self, z, top_k):
        kept = (-abs(z)).argsort(-1, kind="stable").argsort(-1) < (top_k or z.shape[-1])
        gates = self.power * z / (1 + np.sqrt(1 + abs(z))) / (z.shape[-1] if self.spread else 1)
        p = np.exp(z - z.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True), np.where(kept, gates, 0)
