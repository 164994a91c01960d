"""The functional train step: split the model once, then jit over plain states, and write the result back at the end."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_jax.layers.mixing import MoeLoraParam
from moe_lora_jax.models.stacked import is_scanned, stack_layers, unstack_layers
from moe_lora_jax.sharding import is_abstract, mesh_of, put, put_rest, replicated
from moe_lora_jax.train.chunked_loss import model_loss
from moe_lora_jax.train.health import RouterSums, router_sums
from moe_lora_jax.train.losses import load_balancing_loss, router_z_loss

NOISE = ("lora_dropout", "expert_dropout", "router_dropout", "router_jitter_noise")


class Batch(NamedTuple):
    """Padded token rows. For a train step each field has a leading axis of micro-batches: [micro, batch, seq].

    input_ids: [batch, seq] int32.
    attention_mask: [batch, seq] int32, 1 for real tokens.
    loss_mask: [batch, seq] bool, true for the tokens that are targets.
    segment_ids: [batch, seq] int32 where rows hold several sequences: 1, 1, 2, 2, 2, 0 (padding). The first token of
        a segment must not be a target.
    """

    input_ids: jax.Array
    attention_mask: jax.Array
    loss_mask: jax.Array
    segment_ids: jax.Array | None = None

    def arguments(self) -> dict[str, jax.Array]:
        """What a model is called with beside input_ids."""
        if self.segment_ids is None:
            return {"attention_mask": self.attention_mask}
        return {"segment_ids": self.segment_ids}


class TrainState(NamedTuple):
    """What a step changes, and nothing else; every buffer in it is donated to the step.

    trainable: the selected variables. opt_state: the optimizer's, for those only. rng: the layers' dropout streams.
    """

    trainable: nnx.State
    opt_state: optax.OptState
    rng: nnx.State


class FrozenState(NamedTuple):
    """What a step only reads: the unselected part of the adapter, and the base model. Never donated."""

    adapter: nnx.State
    base: nnx.State


class StepMetrics(NamedTuple):
    """Values of one step, still on the device. Losses are means over the whole step (all micro-batches)."""

    loss: jax.Array
    lm_loss: jax.Array
    load_balancing_loss: jax.Array
    router_z_loss: jax.Array
    grad_norm: jax.Array
    counted_tokens: jax.Array
    tokens: jax.Array
    router: dict[str, RouterSums]


TrainStep = jax.stages.Wrapped
"""(TrainState, FrozenState, Batch) -> (TrainState, StepMetrics), jitted; `lower` takes shapes as well."""


def split_model(
    model: nnx.Module, trainable: Callable[..., bool] | type, optimizer: optax.GradientTransformation
) -> tuple[nnx.GraphDef, TrainState, FrozenState]:
    """Splits a model into its graph, what trains and what does not.

    The trainable variables and the RNG streams are copied, so that donating them leaves the model usable; the base
    weights are shared. `merge_back` writes the result into the model.

    The states of a model that scans its layers are stacked (`models.stacked`), the base weights too: a second copy of
    the layers, for as long as the states live. On a mesh, the optimizer's state lies where what it belongs to lies.
    An abstract model (`abstract_base_model`) has abstract states, for `make_train_step(...).lower`.
    """
    graphdef, *states = nnx.split(model, trainable, nnx.RngState, MoeLoraParam, ...)
    selected, rng, adapter, base = states
    abstract = is_abstract(states)
    if not abstract:
        selected, rng = jax.tree.map(jnp.copy, (selected, rng))
    if is_scanned(model):
        selected, rng, adapter, base = stack_layers((selected, rng, adapter, base))
    mesh = mesh_of(selected)
    if abstract:
        opt_state = jax.eval_shape(optimizer.init, selected)  # without shardings
        if mesh is not None:
            opt_state = optax.tree.map_params(optimizer, lambda of, like: put(of, like.sharding), opt_state, selected)
    else:
        opt_state = optimizer.init(selected)
    if mesh is not None:
        opt_state = put_rest(opt_state, mesh)
    return graphdef, TrainState(selected, opt_state, rng), FrozenState(adapter, base)


def merge_back(model: nnx.Module, state: TrainState, frozen: FrozenState) -> None:
    """Writes the trained variables, the rest of the adapter and the RNG streams into the model."""
    nnx.update(model, *unstack_layers((state.trainable, state.rng, frozen.adapter)))


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: MoeLoraConfig | None,
    like: TrainState | None = None,
    *,
    loss_chunk: int | None = None,
) -> TrainStep:
    """The jitted step: mean gradient over all micro-batches, then one optimizer update.

    The loss is next-token loss + router_aux_loss_coef * load balancing + router_z_loss_coef * z loss. Micro-batches are
    weighted by their counted tokens (real tokens for the router terms), so the next-token and z losses and their
    gradients equal those of the joined batch. Load balancing is a product of two means and is balanced within each
    micro-batch, as in every framework.

    Args:
        graphdef: of a model in train mode.
        optimizer: the one that made the state.
        config: the model's adapter config, or None for a model without adapter.
        like: on a mesh, the state; new ones lie where it does.
        loss_chunk: tokens of a row whose logits exist at once; None chooses (`model_loss`).

    Warns:
        UserWarning: when the step is compiled: the config has dropout or jitter, but the model is in eval mode.
    """
    mesh = mesh_of(like)

    def micro_loss(
        trainable: nnx.State, rng: nnx.State, frozen: FrozenState, micro: Batch, totals: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[nnx.State, StepMetrics]]:
        # copied, because variables can only be changed (dropout counts) at the trace level that made them
        states = unstack_layers((trainable, rng, frozen.adapter, frozen.base))
        model = nnx.merge(graphdef, *states, copy=True)
        _warn_of_eval_mode(model, config)
        lm, router = model_loss(
            model, micro.input_ids, micro.loss_mask, micro.arguments(), chunk=loss_chunk, return_router=True
        )
        balance, z = _router_losses(router, micro, config)
        tokens = jnp.sum(micro.attention_mask > 0).astype(jnp.float32)
        counted_share, token_share = lm.counted_tokens / totals[0], tokens / totals[1]
        lm_loss, balance, z = lm.mean * counted_share, balance * token_share, z * token_share
        loss = lm_loss
        if config is not None:
            for coefficient, term in ((config.router_aux_loss_coef, balance), (config.router_z_loss_coef, z)):
                if coefficient:  # XLA would compute the gradient of 0 times a term
                    loss = loss + coefficient * term
        sums = router_sums(router, micro.attention_mask)
        metrics = StepMetrics(loss, lm_loss, balance, z, jnp.zeros(()), lm.counted_tokens, tokens, sums)
        left = nnx.state(model, nnx.RngState)
        return loss, (stack_layers(left) if is_scanned(model) else left, metrics)

    def step(state: TrainState, frozen: FrozenState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        totals = (
            jnp.maximum(jnp.sum(batch.loss_mask[..., 1:]), 1).astype(jnp.float32),
            jnp.maximum(jnp.sum(batch.attention_mask > 0), 1).astype(jnp.float32),
        )

        def accumulate(carry: tuple[nnx.State, Any], micro: Batch) -> tuple[tuple[nnx.State, Any], StepMetrics]:
            rng, grads = carry
            new, (rng, metrics) = jax.grad(micro_loss, has_aux=True)(state.trainable, rng, frozen, micro, totals)
            return (rng, jax.tree.map(jnp.add, grads, new)), metrics

        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        one = batch.input_ids.shape[0] == 1  # unrolled, XLA sees no loop
        (rng, grads), metrics = jax.lax.scan(accumulate, (state.rng, zeros), batch, unroll=one)
        metrics = jax.tree.map(lambda values: jnp.sum(values, axis=0), metrics)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(trainable, opt_state, rng), metrics._replace(grad_norm=optax.tree.norm(grads))

    outputs = None if mesh is None else (jax.tree.map(lambda leaf: leaf.sharding, like), replicated(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=outputs)


def _router_losses(router: Any, batch: Batch, config: MoeLoraConfig | None) -> tuple[jax.Array, jax.Array]:
    if config is None:
        return jnp.zeros(()), jnp.zeros(())
    # the localized loss needs samples marked by type, which a batch has not: it can only be left out
    is_left_out = config.router_aux_loss == "localized" and config.router_aux_loss_coef == 0
    balance = jnp.zeros(()) if is_left_out else load_balancing_loss(router, config, batch.attention_mask)
    return balance, router_z_loss(router, batch.attention_mask)


def _warn_of_eval_mode(model: nnx.Module, config: MoeLoraConfig | None) -> None:
    noise = [name for name in NOISE if getattr(config, name, 0) > 0]
    if noise and all(getattr(module, "deterministic", True) for _, module in nnx.iter_modules(model)):
        text = (
            f"the model is in eval mode, and {', '.join(noise)} off in training: call model.train() before split_model"
        )
        warnings.warn(text, UserWarning, stacklevel=2)
