"""The router of a whole model: an MLP on its last hidden state (X-LoRA) or on a task embedding (MOELoRA)."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.in_words import gates_in_words
from moe_lora_jax.layers.mixing import MoeLoraParam
from moe_lora_jax.layers.router import ROUTER_STD, BaseRouter
from moe_lora_jax.layers.shared import Shared, task_rows


class ModelRouter(BaseRouter):
    """z = MLP(h) / temperature, ReLU between the layers; gates are left in `shared` for the model's layers.

    h is the last hidden state (after the final norm) of a first pass without the adapter, or with every gate
    scaling_pass_value; or a row of the task table.
    In scope "linear" it only hands the task ids on. Always in fp32.

    Variables: `kernels[j]` [in, unit], N(0, 0.02^2); `biases[j]` [unit], zero; `task_embedding` [task, dim],
    N(0, 0.02^2). The last layer's units count layer * expert for a layerwise router, layers in `module_order`.
    """

    def __init__(self, hidden_size: int, layers: int, *, config: MoeLoraConfig, rngs: nnx.Rngs):
        super().__init__(config.for_module(""), config=config, rngs=rngs)
        self.shared = Shared.empty()
        self.only_ids = config.scope == "linear"
        self.reads_hidden = config.router_input == "hidden"
        self.scaling_pass_value = config.scaling_pass_value
        self.dropout = nnx.Dropout(config.router_dropout, deterministic=True)

        def init(*shape: int) -> MoeLoraParam:
            return MoeLoraParam(ROUTER_STD * jax.random.normal(rngs.params(), shape, jnp.float32))

        logits = config.num_experts * config.n_splits * (layers if config.layerwise else 1)
        depth = 0 if self.only_ids else config.router_depth
        inputs = config.task_embedding_dim or hidden_size
        sizes = [inputs, *[config.router_hidden_size or 0] * (depth - 1), logits]
        self.kernels = nnx.List([init(sizes[j], sizes[j + 1]) for j in range(depth)])
        self.biases = nnx.List([MoeLoraParam(jnp.zeros(sizes[j + 1])) for j in range(depth) if config.router_bias])
        has_table = config.router_input == "task" and not self.only_ids
        self.task_embedding = init(config.num_tasks or 0, config.task_embedding_dim or logits) if has_table else None

    def facts(self) -> str:
        """See `display`."""
        if self.only_ids:
            return "hands the task ids to the routers of the layers"
        reads = "the last hidden state" if self.reads_hidden else "the task ids"
        return f"{reads} -> {self.num_experts} experts of every layer; {gates_in_words(self.gating)}"

    def begin_first_pass(self) -> None:
        """Sets the gates of the pass that gives the hidden states, if the adapter takes part in it."""
        if self.scaling_pass_value:
            gate = self.scaling_pass_value * self.gating.routed_scaling_factor
            self.shared.set_value(jnp.full((1, 1, self.n_splits, self.num_experts), gate, jnp.float32))

    def route_hidden(self, hidden: jax.Array) -> None:
        """Sets the gates from hidden states [batch, seq, hidden]; no gradient goes into a pass with the adapter."""
        if self.scaling_pass_value:
            hidden = jax.lax.stop_gradient(hidden)
        self._route(self.jittered(hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32)))

    def route_tasks(self, task_ids: jax.Array | None) -> None:
        """Sets the gates, or hands on the ids, for task ids [batch] or [batch, n].

        Raises:
            ValueError: there are none.
        """
        if task_ids is None:
            raise ValueError("this adapter routes by task: call the model with task_ids=")
        if self.only_ids:
            self.shared.set_value(jnp.asarray(task_ids))
        else:
            assert self.task_embedding is not None
            self._route(task_rows(self.task_embedding[...].astype(jnp.float32), task_ids))

    def _route(self, x: jax.Array) -> None:
        for j, kernel in enumerate(self.kernels):
            if j > 0:
                x = self.dropout(jax.nn.relu(x), rngs=self.rngs)
            x = jnp.matmul(x, kernel[...].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
            if self.biases:
                x = x + self.biases[j][...].astype(jnp.float32)
        logits = (x / self.gating.router_temperature).reshape(x.shape[0], -1, self.n_splits, self.num_experts)
        self.shared.set_value(self.weights(self.decide(logits, self.gating.threshold).gates))
