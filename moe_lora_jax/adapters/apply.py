"""Finds the target layers of a model by their paths and swaps mixtures in; and out again."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.base_name import hub_named
from moe_lora_interop.config.modules import block_of, last_bias_problem, last_layer, order_problems, router_owners
from moe_lora_interop.config.routing_rule import function_of
from moe_lora_interop.config.stuck_routers import warn_of_stuck_routers
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_jax.adapters.abstract import change_abstractly
from moe_lora_jax.adapters.model_spec import ModelSpec, module_name
from moe_lora_jax.layers.feed_forward import MoeLoraFeedForward, SlotLinear
from moe_lora_jax.layers.linear import MoeLoraLinear
from moe_lora_jax.layers.linear_maps import LinearMap, linear_map
from moe_lora_jax.layers.model_router import ModelRouter
from moe_lora_jax.layers.multi_adapter import MultiAdapterLinear
from moe_lora_jax.layers.shared import Shared
from moe_lora_jax.sharding import is_abstract, place_adapter
from moe_lora_jax.tree import _find, has_adapter, modules, replace_module


class LinearLayer(NamedTuple):
    """A layer that can carry experts: where it is, the layer, and how it is a matrix."""

    path: str
    layer: Any
    map: LinearMap


def apply_moe_lora(
    model: nnx.Module,
    config: MoeLoraConfig,
    *,
    rngs: nnx.Rngs,
    param_dtype: jnp.dtype = jnp.float32,
    spec: ModelSpec | None = None,
) -> nnx.Module:
    """Wraps every targeted linear layer of `model` in a mixture, in place, and returns the model.

    Linear layers are `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Einsum` and the classes that `spec` adds.

    Args:
        model: any NNX model; a layer's path joined with dots is its module name, unless `spec` translates it. Routers
            of the model and task routing need a model that carries `moe_lora_router` through its forward pass, as those
            of `load_base_model` do.
        config: which layers, and what mixture. "all-linear" is every linear layer but lm_head.
        rngs: streams "params" and "dropout".
        param_dtype: storage dtype of A and B.
        spec: names and layer classes of a model that `load_base_model` did not make.

    Where the base model's variables are on a mesh of devices, the adapter's are too (`sharding.place_adapter`). On an
    abstract model (`abstract_base_model`) the adapter is one of shapes, and `rngs` stays as it is. The config with its
    targets resolved is kept as `model.moe_lora_config`; `save_pretrained` writes it.

    Raises:
        ConfigError: target_modules match nothing, or the config does not fit the matched modules.
        CheckpointError: the model already carries an adapter (`remove_moe_lora` takes it off).

    Warns:
        UserWarning: a renormalised top-1 router, which cannot learn.
    """
    if has_adapter(model):
        raise CheckpointError("the model already has an adapter: call remove_moe_lora(model) first")
    spec = spec or ModelSpec()
    chosen = config.targets.select(linear_layers(model, spec))
    apply_to_modules(model, config, chosen, rngs=rngs, param_dtype=param_dtype, spec=spec)
    warn_of_stuck_routers(config, chosen)
    return model


def apply_to_modules(
    model: nnx.Module,
    config: MoeLoraConfig,
    chosen: list[str],
    *,
    rngs: nnx.Rngs,
    param_dtype: jnp.dtype,
    spec: ModelSpec,
) -> nnx.Module:
    """`apply_moe_lora` on exactly these layers, whatever else the config's names may match."""
    if config.modules_to_save:
        problem = f"modules_to_save: found {config.modules_to_save}, expected null: only PyTorch saves whole modules"
        raise ConfigError("the config does not fit the model", [problem])
    if config.routing_rule is not None:
        function_of(config.routing_rule, "jax")  # before anything of the model is changed
    if is_abstract(model):
        apply = partial(apply_to_modules, config=config, chosen=chosen, param_dtype=param_dtype, spec=spec)
        return change_abstractly(model, rngs, lambda model, rngs: apply(model, rngs=rngs))
    linears = linear_layers(model, spec)
    names = tuple(spec.names.items())
    unnamed = [m for m in chosen if names and module_name(linears[m].path, names) is None]
    if unnamed:
        problems = [f"{m}: no template of the spec's names fits this layer's path" for m in unnamed]
        raise ConfigError("target modules without a name", problems)
    sizes = config.for_modules(chosen)
    config = _completed(model, config, chosen)
    routed = [m for m in chosen if sizes[m].has_router]
    alone = [m for m in chosen if config.scope != "ffn" or not sizes[m].has_router]
    blocks = (
        [_plan_block(model, b, linears, routed, config) for b in router_owners(config, routed)]
        if config.scope == "ffn"
        else []
    )
    shared = _add_model_router(model, config, routed, rngs)
    order = config.module_order or []
    for module in alone:  # before the blocks, which may contain some of them
        found = linears[module]
        wrapper = MoeLoraLinear(
            found.layer,
            found.map.in_features,
            found.map.out_features,
            sizes[module],
            config=config,
            shared=shared,
            layer_index=order.index(module) if module in order else 0,
            linear_map=found.map,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        replace_module(model, found.path, wrapper)
    for block in blocks:
        _wrap_block(model, block, config, param_dtype=param_dtype, rngs=rngs)
    model.moe_lora_config = config  # type: ignore[attr-defined]
    if names:
        model.moe_lora_names = names  # type: ignore[attr-defined]
    place_adapter(model)
    return model


def remove_moe_lora(model: nnx.Module) -> nnx.Module:
    """Takes the adapter, or a bank's adapters, off the model, in place; the base layers return unchanged."""
    kinds = (MultiAdapterLinear, MoeLoraFeedForward, SlotLinear, MoeLoraLinear)
    for kind in kinds:  # blocks first: the paths of their layers lead through them
        for path, wrapper in [(p, m) for p, m in modules(model) if isinstance(m, kind)]:
            replace_module(model, path, wrapper.base_layer)
    if getattr(model, "moe_lora_router", None) is not None:
        model.moe_lora_router = None  # type: ignore[attr-defined]
    for name in ("moe_lora_config", "moe_lora_names", "moe_lora_dtypes", "moe_lora_rows"):
        if hasattr(model, name):
            delattr(model, name)
    return model


def linear_layers(model: nnx.Module, spec: ModelSpec) -> dict[str, LinearLayer]:
    """{module name: layer} of every linear layer of a model without adapter; the path where `spec` has no name for it.

    Raises:
        ConfigError: two layers would have one name.
    """
    names = tuple(spec.names.items())
    found: dict[str, LinearLayer] = {}
    problems = []
    for path, layer in modules(model):
        linear = linear_map(layer, spec.layers)
        if linear is None:
            continue
        name = module_name(path, names) or path
        if name in found:
            problems.append(f"{name}: found as the name of {found[name].path} and of {path}, expected one layer")
        found[name] = LinearLayer(path, layer, linear)
    if problems:
        raise ConfigError("names are ambiguous", problems)
    return found


def adapted_names(model: Any) -> dict[str, str]:
    """{path: module name} of everything that carries variables of the adapter, if the names are not the paths."""
    names = getattr(model, "moe_lora_names", ())
    found: dict[str, str] = {}
    for path, module in modules(model) if names else ():
        plain = ".".join(part for part in path.split(".") if part != "base_layer")
        if isinstance(module, MoeLoraLinear | SlotLinear) and (name := module_name(plain, names)) is not None:
            found[plain] = name
            if isinstance(module, SlotLinear):  # its block's router
                found[plain.rpartition(".")[0]] = name.rpartition(".")[0]
    return found


def _completed(model: nnx.Module, config: MoeLoraConfig, chosen: list[str]) -> MoeLoraConfig:
    """The config with everything filled in that only the model knows."""
    config = config.resolved(chosen)
    if config.base_model_name_or_path is None:
        path = getattr(getattr(model, "config", None), "name_or_path", None)
        if path is not None:
            config = hub_named(replace(config, base_model_name_or_path=str(path)))
    routed = config.routed(chosen)
    if problems := order_problems(config, routed):
        raise ConfigError("the config does not fit the model", problems)
    if config.layerwise and config.module_order is None:
        ordered = [m for m in getattr(model, "linear_order", list)() if m in routed]
        if len(ordered) != len(routed):
            problem = (
                "layerwise: this model does not tell the order of its modules, expected module_order in the config"
            )
            raise ConfigError("the config does not fit the model", [problem])
        config = replace(config, module_order=ordered)
    return config


def _add_model_router(model: Any, config: MoeLoraConfig, routed: list[str], rngs: nnx.Rngs) -> Shared | None:
    if not routed or (config.scope != "model" and config.router_input != "task"):
        return None
    if not hasattr(model, "moe_lora_router"):
        problem = (
            f"scope {config.scope} with router_input {config.router_input}: {type(model).__name__} has no place for a "
            "router of the model (an attribute moe_lora_router that its forward uses), expected scope linear or ffn"
        )
        raise ConfigError("the config does not fit the model", [problem])
    model.moe_lora_router = ModelRouter(model.config.hidden_size, len(routed), config=config, rngs=rngs)
    return model.moe_lora_router.shared


@dataclass(frozen=True)
class _Block:
    """A feed-forward block that fits: {attribute: (module name, layer)}, those that are targets, and the last one."""

    name: str
    path: str
    layers: dict[str, tuple[str, LinearLayer]]
    targets: frozenset[str]
    last: str


def _plan_block(
    model: nnx.Module, block: str, linears: dict[str, LinearLayer], routed: list[str], config: MoeLoraConfig
) -> _Block:
    paths = {linears[m].path.rpartition(".")[0] for m in routed if block_of(m) == block}
    path = paths.pop()
    layers = {
        found.path.rpartition(".")[2]: (name, found)
        for name, found in linears.items()
        if found.path.rpartition(".")[0] == path
    }
    problems = [f"{block}: its layers are in {path} and {other}, expected one module" for other in sorted(paths)]
    problems += [
        f"{name}: {found.map}, expected a layer from the last axis to the last axis"
        for name, found in layers.values()
        if not found.map.is_last_axis
    ]
    shapes = {name: (m.map.in_features, m.map.out_features) for name, (_, m) in layers.items()}
    last = last_layer(shapes)
    if last is None:
        problems.append(f"{block}: found the layers {shapes}, expected exactly one whose output is the block's")
    if problems:
        raise ConfigError("scope ffn does not fit the model", problems)
    assert last is not None
    has_bias = getattr(layers[last][1].layer, "bias", None) is not None
    if has_bias and (problem := last_bias_problem(config, layers[last][0])) is not None:
        raise ConfigError("scope ffn does not fit the model", [problem])
    targets = frozenset(linears[m].path.rpartition(".")[2] for m in routed if block_of(m) == block)
    return _Block(block, path, {n: m for n, m in layers.items() if n in targets or n == last}, targets, last)


def _wrap_block(
    model: nnx.Module, block: _Block, config: MoeLoraConfig, *, param_dtype: jnp.dtype, rngs: nnx.Rngs
) -> None:
    """Replaces the linear layers of a feed-forward block by `SlotLinear`s and the block by a `MoeLoraFeedForward`."""
    owner = _find(model, block.path)
    sizes, shared = config.for_module(block.name), Shared.empty()
    for attribute, (name, found) in block.layers.items():
        slot_layer = SlotLinear(
            getattr(owner, attribute),  # plain LoRA by now, if the config gives this layer one expert
            found.map.in_features,
            found.map.out_features,
            config.for_module(name),
            shared,
            config=config,
            is_last=attribute == block.last,
            is_target=attribute in block.targets,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        setattr(owner, attribute, slot_layer)
    width = block.layers[block.last][1].map.out_features
    replace_module(model, block.path, MoeLoraFeedForward(owner, width, sizes, shared, config=config, rngs=rngs))
