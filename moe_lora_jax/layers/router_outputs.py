"""From what routers sowed during a forward pass to {module path: RouterOutput}."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_jax.layers.gating import RouterOutput

MODEL = "model"
"""The name of a router of the whole model."""


def router_outputs(
    records: nnx.State, config: MoeLoraConfig | None, batch_seq: tuple[int, ...]
) -> dict[str, RouterOutput]:
    """Sorts the records of one call by module, each reshaped to [batch, seq, (split,) expert].

    Args:
        records: the state that `nnx.capture` returned.
        config: the adapter's config; None without adapter.
        batch_seq: shape of the input ids.
    """
    found: dict[str, RouterOutput] = {}
    for path, variable in nnx.to_flat_state(records):
        *owner, _ = (str(part) for part in path if part != "base_layer")
        (decision,) = variable.get_value()
        assert config is not None, "only adapters record"
        if owner == ["moe_lora_router"]:
            names = config.module_order if config.layerwise and config.module_order else [MODEL]
            for index, name in enumerate(names):
                found[name] = _shaped(decision, batch_seq, lambda a, i=index: a[:, i])
        else:
            found[".".join(owner[:-1])] = _shaped(decision, batch_seq, lambda a: a)
    return dict(sorted(found.items()))


def alike(
    router: Mapping[str, RouterOutput], kind: Callable[[str], Any] = lambda module: None
) -> Iterator[tuple[Any, list[str], RouterOutput]]:
    """Groups of modules of one kind and shape: (kind, their names, their outputs with a leading axis [module, ...]).

    What is computed for all of a group at once is a few kernels, where one module after the other takes a few each.
    """
    groups: dict[Any, list[str]] = {}
    for module, out in router.items():
        groups.setdefault((kind(module), out.logits.shape), []).append(module)
    for (of_group, _), modules in groups.items():
        yield of_group, modules, jax.tree.map(lambda *arrays: jnp.stack(arrays), *(router[m] for m in modules))


def _shaped(decision: RouterOutput, batch_seq: tuple[int, ...], pick: Any) -> RouterOutput:
    def shape(rows: jax.Array) -> jax.Array:
        picked = pick(rows)  # [rows, split, expert]
        if picked.shape[1] == 1:
            picked = picked[:, 0]
        batch, seq = batch_seq
        if picked.shape[0] == batch * seq:
            return picked.reshape(batch, seq, *picked.shape[1:])
        return jnp.broadcast_to(picked[:, None], (batch, seq, *picked.shape[1:]))

    return RouterOutput(*map(shape, decision))
