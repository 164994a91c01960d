"""How a decoder runs its layers: one after the other or as one scan, with or without rematerialisation.

The model keeps a list of layers in either form, so adapters, filters, checkpoints and generation need not know. A scan
stacks the layers' variables inside the step: its body is one layer. That costs a copy of the layers' weights, and
instructions for each of them, unless the step gets them already stacked (`models.stacked`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_jax.layers.shared import Shared
from moe_lora_jax.models.remat import with_remat


def run_layers(
    layers: Sequence[nnx.Module],
    x: jax.Array,
    call: Callable[[Any, jax.Array, Any], jax.Array],
    contexts: Sequence[Any],
    kinds: Sequence[int],
    *,
    scan: bool,
    remat: str,
) -> jax.Array:
    """x after `x = call(layer, x, contexts[kind])` for every layer and its kind.

    The layers keep what the calls leave in them: RNG counts, and what `nnx.capture` collects.

    Args:
        layers: the layers; for a scan alike in everything but the values of their variables.
        x: the activations, of one shape throughout.
        call: runs one layer.
        contexts: pytrees of arrays, one for each kind of layer, with shapes that broadcast to each other.
        kinds: the kind of each layer.
        scan: one `jax.lax.scan` over all layers instead of a loop.
        remat: the policy by which each layer is computed again in the backward pass, see `remat`.

    Raises:
        ValueError: a scan over layers that differ.
    """
    parts: list[Any] = [nnx.split(layer, nnx.RngState, Shared, ...) for layer in layers]

    def one(graphdef: nnx.GraphDef) -> Callable[..., Any]:
        def run(x: jax.Array, rng: nnx.State, shared: nnx.State, state: nnx.State, context: Any) -> Any:
            layer = nnx.merge(graphdef, rng, shared, state, copy=True)
            types = [type(variable) for variable in getattr(layer, "__captures__", ())]
            captured: list[nnx.State] = []
            if types:
                x, *captured = nnx.capture(lambda layer: call(layer, x, context), *types)(layer)
            else:
                x = call(layer, x, context)
            return x, (nnx.state(layer, nnx.RngState), captured)

        return with_remat(run, remat, prevent_cse=not scan)

    if not scan:
        for layer, (graphdef, rng, shared, state), kind in zip(layers, parts, kinds, strict=True):
            x, left = one(graphdef)(x, rng, shared, state, contexts[kind])
            _leave(layer, *left)
        return x

    _check_alike(parts)
    graphdef, _, shared, _ = parts[0]  # what is shared is the same for all
    stacked = _stack([(rng, state) for _, rng, _, state in parts])
    if len(contexts) > 1:
        context = jax.tree.map(lambda *arrays: jnp.stack(jnp.broadcast_arrays(*arrays)), *contexts)
        choose = lambda kind: jax.tree.map(lambda a: a[kind], context)  # noqa: E731
    else:
        choose = lambda _: contexts[0]  # noqa: E731
    run = one(graphdef)

    def step(x: jax.Array, of_layer: Any) -> Any:
        (rng, state), kind = of_layer
        return run(x, rng, shared, state, choose(kind))

    x, left = jax.lax.scan(step, x, (stacked, jnp.asarray(kinds)))
    for index, layer in enumerate(layers):
        _leave(layer, *jax.tree.map(lambda a, i=index: a[i], left))
    return x


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def _check_alike(parts: Sequence[Any]) -> None:
    shapes = [[(a.shape, a.dtype) for a in jax.tree.leaves(states)] for _, *states in parts]
    for index, (graphdef, *_) in enumerate(parts):
        if graphdef != parts[0][0] or shapes[index] != shapes[0]:
            raise ValueError(
                f"scan_layers: found layer {index} unlike layer 0, expected one program for all layers. Adapters that "
                "differ by layer (targets, ranks, alphas, experts or top_k by pattern, a layerwise router) need a "
                "model loaded with scan_layers=False"
            )


def _leave(layer: nnx.Module, rng: nnx.State, captured: Sequence[nnx.State]) -> None:
    """Puts what a copy of the layer collected into the layer."""
    nnx.update(layer, rng)
    for state in captured:
        for path, variable in nnx.to_flat_state(state):
            owner: Any = layer
            for part in path[:-1]:
                owner = getattr(owner, str(part))
            for value in variable.get_value():
                owner.sow(type(variable), str(path[-1]), value)
