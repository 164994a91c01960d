"""Routers that stand at a linear layer or a feed-forward block, and what they report."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_lora_interop.config.adapter_config import ModuleConfig, MoeLoraConfig
from moe_lora_interop.config.in_words import gates_in_words
from moe_lora_jax.layers.display import Described
from moe_lora_jax.layers.gating import Gating, RouterOutput, route
from moe_lora_jax.layers.joint_product import exact_product
from moe_lora_jax.layers.mixing import MoeLoraParam
from moe_lora_jax.layers.shared import Shared, task_rows
from moe_lora_jax.layers.temperature import Temperature

ROUTER_STD = 0.02


class RouterRecord(nnx.Intermediate):
    """The variable type under which routers sow their `RouterOutput`; read it with `nnx.capture`."""


class BaseRouter(Described, nnx.Module):
    """What every router does, wherever it stands: jitter before its logits, then the decision, then the weights."""

    def __init__(self, sizes: ModuleConfig, *, config: MoeLoraConfig, rngs: nnx.Rngs):
        self.gating = Gating.of(config, sizes)
        self.num_experts, self.n_splits = sizes.num_experts, config.n_splits
        self.router_jitter_noise = config.router_jitter_noise
        self.expert_dropout = nnx.Dropout(config.expert_dropout, deterministic=True)
        self.deterministic = True  # flipped by model.train() / model.eval()
        random = max(config.router_jitter_noise, config.expert_dropout, config.router_dropout) > 0
        self.rngs = rngs["dropout"].fork() if random else nnx.data(None)

    @property
    def is_jittering(self) -> bool:
        """Whether `jittered` changes values."""
        return self.router_jitter_noise > 0 and not self.deterministic

    def jittered(self, x: jax.Array) -> jax.Array:
        """x; in training, in fp32, times U(1 - eps, 1 + eps), eps = router_jitter_noise."""
        if not self.is_jittering:
            return x
        assert self.rngs is not None
        eps, x = self.router_jitter_noise, x.astype(jnp.float32)
        return x * jax.random.uniform(self.rngs(), x.shape, jnp.float32, 1.0 - eps, 1.0 + eps)

    def decide(self, logits: jax.Array, tau: jax.Array | float | None) -> RouterOutput:
        """See `route`. Hands the decision to `nnx.capture`, if the call runs under it (else sowing is deprecated)."""
        decision = route(logits, self.gating, tau)
        if hasattr(self, "__captures__"):
            self.sow(RouterRecord, "router_output", decision)
        return decision

    def weights(self, gates: jax.Array) -> jax.Array:
        """routed_scaling_factor g, with expert_dropout in training."""
        factor = self.gating.routed_scaling_factor
        gates = self.expert_dropout(gates, rngs=self.rngs)
        return gates if factor == 1 else gates * factor


class Router(BaseRouter):
    """z = (R x + b) / T; gates as in `route`. Always in fp32.

    Variables: `kernel` [in, logit], N(0, 0.02^2) at init; `bias` [logit], zero; with an adaptive threshold
    tau = threshold * sigmoid(w.x + c): `threshold_kernel` [in] and `threshold_bias` [], zero. `logit` is the experts,
    times n_splits. T is router_temperature, or what `temperature` gives with temperature_hidden_size.
    """

    def __init__(self, in_features: int, sizes: ModuleConfig, *, config: MoeLoraConfig, rngs: nnx.Rngs):
        super().__init__(sizes, config=config, rngs=rngs)
        logits = sizes.num_experts * config.n_splits
        self.kernel = MoeLoraParam(ROUTER_STD * jax.random.normal(rngs.params(), (in_features, logits), jnp.float32))
        self.bias = MoeLoraParam(jnp.zeros(logits, jnp.float32)) if config.router_bias else None
        adaptive = config.adaptive_threshold
        self.threshold_kernel = MoeLoraParam(jnp.zeros(in_features, jnp.float32)) if adaptive else None
        self.threshold_bias = MoeLoraParam(jnp.zeros((), jnp.float32)) if adaptive else None
        width, least = config.temperature_hidden_size, config.router_temperature
        self.temperature = None if width is None else Temperature(in_features, width, least, rngs=rngs)

    def __call__(self, x: jax.Array) -> RouterOutput:
        """Routes x [tokens, in]: fields [tokens, split, expert]."""
        x = self.jittered(x)
        return self.from_product(exact_product(x, self.columns()), x)

    def columns(self) -> jax.Array:
        """What x is multiplied by, fp32 [in, column]: R, and w of an adaptive threshold."""
        kernel = self.kernel[...].astype(jnp.float32)
        if self.threshold_kernel is None:
            return kernel
        return jnp.concatenate([kernel, self.threshold_kernel[...].astype(jnp.float32)[:, None]], axis=1)

    def from_product(self, product: jax.Array, x: jax.Array) -> RouterOutput:
        """The decision for [tokens, column], the product of x and `columns`; x is for a temperature of its own."""
        logits, tau = product[:, : self.num_experts * self.n_splits], self.gating.threshold
        if self.bias is not None:
            logits = logits + self.bias[...]
        temperature = self.gating.router_temperature if self.temperature is None else self.temperature(x)
        logits = (logits / temperature).reshape(product.shape[0], self.n_splits, self.num_experts)
        if self.threshold_bias is None:
            return self.decide(logits, tau)
        assert tau is not None, "the config requires it"
        score = product[:, -1] + self.threshold_bias[...]
        return self.decide(logits, tau * jax.nn.sigmoid(score)[:, None, None])

    def facts(self) -> str:
        """See `display`."""
        splits = f" for each of {self.n_splits} splits" if self.n_splits > 1 else ""
        return f"{self.kernel.shape[0]} -> {self.num_experts} experts{splits}; {gates_in_words(self.gating)}"


class TaskRouter(BaseRouter):
    """A table of logits per task at one layer (Poly): z = T[task] / temperature.

    Variables: `task_embedding` [task, logit], N(0, 0.02^2) at init. `shared` brings the task ids.
    """

    def __init__(self, sizes: ModuleConfig, shared: Shared, *, config: MoeLoraConfig, rngs: nnx.Rngs):
        super().__init__(sizes, config=config, rngs=rngs)
        assert config.num_tasks is not None, "the config requires it"
        shape = (config.num_tasks, sizes.num_experts * config.n_splits)
        self.task_embedding = MoeLoraParam(ROUTER_STD * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.shared = shared

    def facts(self) -> str:
        """See `display`."""
        tasks = self.task_embedding.shape[0]
        return f"{tasks} tasks -> {self.num_experts} experts; {gates_in_words(self.gating)}"

    def __call__(self, x: jax.Array) -> RouterOutput:
        """Routes by task, whatever x: fields [row, split, expert], a row being a sequence."""
        if self.shared.is_empty:
            raise ValueError("this adapter routes by task: call the model with task_ids=")
        rows = task_rows(self.task_embedding[...].astype(jnp.float32), self.shared.get_value())
        logits = (rows / self.gating.router_temperature).reshape(rows.shape[0], self.n_splits, self.num_experts)
        return self.decide(logits, self.gating.threshold)
