"""A Llama with a mixture of LoRA experts in plain numpy (float64): the formulas of the config, written out."""

import numpy as np

from moe_lora_interop import Adapter, MoeLoraConfig


class NumpyMixture:
    """The third implementation, with loops over tokens and experts and nothing fused.

    Args:
        weights: the base model's tensors under Hugging Face's names.
        settings: its config.json.
        adapter: what to compute beside it.

    Attributes:
        margin: how far the nearest expert was from being selected otherwise. Below the accuracy of fp32 another
            implementation may rightly select another one.
    """

    def __init__(self, weights: dict[str, np.ndarray], settings: dict, adapter: Adapter):
        self.weights = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
        self.tensors = {slot: tensor.astype(np.float64) for slot, tensor in adapter.tensors.items()}
        self.settings, self.config, self.modules = settings, adapter.config, set(adapter.modules)
        self.routed = {m for m in self.modules if self.config.for_module(m).has_router}
        self.margin = np.inf
        self.is_on = True

    def logits(self, ids: np.ndarray, task_ids: np.ndarray | None = None) -> np.ndarray:
        """[batch, seq, vocab] of ids [batch, seq]."""
        return np.stack([self._sample(row, None if task_ids is None else task_ids[b]) for b, row in enumerate(ids)])

    def _sample(self, ids: np.ndarray, task: np.ndarray | None) -> np.ndarray:
        c = self.config
        self.model_gates = None
        self.task = task
        if c.scope == "model" and self.routed:
            groups = len(c.module_order) if c.layerwise else c.n_splits
            if c.router_input == "hidden":
                gate = c.scaling_pass_value * c.routed_scaling_factor
                self.is_on, self.model_gates = gate != 0, np.full((len(ids), groups, c.num_experts), gate)
                inputs = self._hidden(ids)
                self.is_on = True
            else:
                inputs = np.stack([self._task_row("", task)] * len(ids))
            logits = np.stack([self._mlp(x) for x in inputs]) / c.router_temperature
            top_k = c.for_module("").top_k
            z = logits.reshape(len(ids), groups, c.num_experts)
            self.model_gates = np.stack([[self._gates(one, top_k, c.threshold) for one in token] for token in z])
        return self._hidden(ids) @ self.weights["lm_head.weight"].T

    # --- the mixture -------------------------------------------------------------------------------------------------

    def _linear(self, path: str, x: np.ndarray) -> np.ndarray:
        """One linear layer of scope linear or model, or a plain LoRA: x [seq, in] -> [seq, out]."""
        w = self.weights[f"{path}.weight"]
        if not self.is_on or path not in self.modules:
            return x @ w.T
        if path in self.routed:
            return x @ w.T + np.stack(
                [self._delta(path, token, self._layer_gates(path, t, token)) for t, token in enumerate(x)]
            )
        return x @ self._expert_weight(path, 0).T

    def _delta(self, path: str, x: np.ndarray, gates: np.ndarray) -> np.ndarray:
        """One token x [in], gates [split, expert]."""
        a, b = self.tensors[path, "lora_A"], self.tensors[path, "lora_B"]
        scalings = self._scalings(path)
        if self.config.mix == "weights":
            splits = self.config.n_splits
            mixed_a = np.concatenate(
                [
                    sum(g * part for g, part in zip(gates[q], np.split(a, splits, 2)[q], strict=True))
                    for q in range(splits)
                ],
                1,
            )
            mixed_b = np.concatenate(
                [
                    sum(g * part for g, part in zip(gates[q], np.split(b, splits, 1)[q], strict=True))
                    for q in range(splits)
                ],
                0,
            )
            return scalings[0] * mixed_b @ (mixed_a @ x)
        return sum(gates[0][e] * s * b[e] @ (a[min(e, len(a) - 1)] @ x) for e, s in enumerate(scalings))

    def _expert_weight(self, path: str, expert: int) -> np.ndarray:
        """W0 + s_e B_e A_e; a layer that is no target is W0 for every expert, a plain LoRA has one for all."""
        w = self.weights[f"{path}.weight"]
        if path not in self.modules:
            return w
        a, b = self.tensors[path, "lora_A"], self.tensors[path, "lora_B"]
        expert = expert if path in self.routed else 0
        return w + self._scalings(path)[expert] * b[expert] @ a[min(expert, len(a) - 1)]

    def _scalings(self, path: str) -> list[float]:
        sizes = self.config.for_module(path)
        return [
            alpha / (np.sqrt(r) if self.config.use_rslora else r)
            for alpha, r in zip(sizes.alphas, sizes.ranks, strict=True)
        ]

    def _feed_forward(self, path: str, x: np.ndarray) -> np.ndarray:
        names = [f"{path}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
        if not self.is_on or self.config.scope != "ffn" or not self.routed & set(names):
            return self._linear(names[2], silu(self._linear(names[0], x)) * self._linear(names[1], x))
        out = np.zeros_like(x)
        for t, token in enumerate(x):
            for e, gate in enumerate(self._own_gates(path, token)[0]):
                gate_w, up_w, down_w = (self._expert_weight(name, e) for name in names)
                out[t] += gate * down_w @ (silu(gate_w @ token) * (up_w @ token))
        return out

    # --- gates -------------------------------------------------------------------------------------------------------

    def _layer_gates(self, path: str, t: int, x: np.ndarray) -> np.ndarray:
        """[split, expert] for token t."""
        if self.model_gates is None:
            return self._own_gates(path, x)
        if self.config.layerwise:
            return self.model_gates[t][[self.config.module_order.index(path)]]
        return self.model_gates[t]

    def _own_gates(self, owner: str, x: np.ndarray) -> np.ndarray:
        """Of a router at a linear layer or a feed-forward block, from its input x or from the task: [split, expert]."""
        c, sizes = self.config, self.config.for_module(owner)
        if c.router_input == "task":
            z = self._task_row(owner, self.task)
        else:
            if c.router_input == "expert_activations":
                x = np.concatenate([np.maximum(a @ x, 0) for a in self.tensors[owner, "lora_A"]])
            z = self.tensors[owner, "router"] @ x + self.tensors.get((owner, "router_bias"), 0)
        tau = c.threshold
        if c.adaptive_threshold:
            score = self.tensors[owner, "threshold"] @ x + self.tensors[owner, "threshold_bias"]
            tau = c.threshold * sigmoid(score)
        temperature = c.router_temperature
        if c.temperature_hidden_size is not None:
            for j in range(2):
                x = np.maximum(x, 0) if j else x
                x = self.tensors[owner, f"temperature_{j}"] @ x + self.tensors[owner, f"temperature_bias_{j}"]
            temperature += np.logaddexp(0, -x[0])
        z = (z / temperature).reshape(c.n_splits, sizes.num_experts)
        return np.stack([self._gates(one, sizes.top_k, tau) for one in z])

    def _gates(self, z: np.ndarray, top_k: int | None, tau: float | None) -> np.ndarray:
        """One token: z [expert] -> g [expert], times routed_scaling_factor."""
        c = self.config
        p, _, g = decide(z, c, top_k, tau)
        if top_k is not None and top_k < len(z):
            ordered = np.sort(np.abs(z) if c.scoring_func == "abs_softmax" else z)[::-1]
            self.margin = min(self.margin, ordered[top_k - 1] - ordered[top_k])
            if c.top_p is not None:
                self.margin = min(self.margin, np.abs(np.cumsum(np.sort(p)[::-1]) - c.top_p).min())
            if c.entropy_threshold is not None:
                self.margin = min(self.margin, abs(entropy(p, c) - c.entropy_threshold))
        elif tau is not None:
            self.margin = min(self.margin, np.abs(p - tau).min())
        return self.config.routed_scaling_factor * g

    def _task_row(self, owner: str, task: np.ndarray) -> np.ndarray:
        table = self.tensors[owner, "task_embedding"]
        if np.ndim(task) == 0:
            return table[task]
        given = [i for i in task if i > 0]
        return sum((table[i] for i in given), np.zeros(table.shape[1])) / max(len(given), 1)

    def _mlp(self, x: np.ndarray) -> np.ndarray:
        for j in range(self.config.router_depth):
            x = np.maximum(x, 0) if j else x
            x = self.tensors["", f"router_{j}"] @ x + self.tensors.get(("", f"router_bias_{j}"), 0)
        return x

    # --- the base model ----------------------------------------------------------------------------------------------

    def _hidden(self, ids: np.ndarray) -> np.ndarray:
        """[seq, hidden] after the final norm."""
        x = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(self.settings["num_hidden_layers"]):
            path = f"model.layers.{layer}"
            x = x + self._attention(f"{path}.self_attn", self._norm(f"{path}.input_layernorm", x))
            x = x + self._feed_forward(f"{path}.mlp", self._norm(f"{path}.post_attention_layernorm", x))
        return self._norm("model.norm", x)

    def _norm(self, path: str, x: np.ndarray) -> np.ndarray:
        return (
            self.weights[f"{path}.weight"]
            * x
            / np.sqrt((x * x).mean(-1, keepdims=True) + self.settings["rms_norm_eps"])
        )

    def _attention(self, path: str, x: np.ndarray) -> np.ndarray:
        heads, kv_heads = self.settings["num_attention_heads"], self.settings["num_key_value_heads"]
        q, k, v = (self._linear(f"{path}.{name}_proj", x) for name in "qkv")
        q, k, v = (y.reshape(len(x), -1, x.shape[1] // heads).swapaxes(0, 1) for y in (q, k, v))  # [head, seq, dim]
        k, v = (np.repeat(y, heads // kv_heads, axis=0) for y in (k, v))
        q, k = self._rotate(q), self._rotate(k)
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = (p / p.sum(-1, keepdims=True)) @ v
        return self._linear(f"{path}.o_proj", out.swapaxes(0, 1).reshape(len(x), -1))

    def _rotate(self, y: np.ndarray) -> np.ndarray:
        _, seq, dim = y.shape
        theta = self.settings["rope_parameters"]["rope_theta"]
        angles = np.outer(np.arange(seq), theta ** (-np.arange(0, dim, 2) / dim))
        cos, sin = (np.concatenate([f(angles)] * 2, -1) for f in (np.cos, np.sin))
        left, right = np.split(y, 2, -1)
        return y * cos + np.concatenate([-right, left], -1) * sin


def decide(
    z: np.ndarray, c: MoeLoraConfig, top_k: int | None, tau: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One token: z [expert] -> the scores p, which experts are kept, and g before routed_scaling_factor."""
    if c.routing is not None:
        p, g = (rows[0] for rows in c.routing_rule.numpy(z[None], top_k))
        return p, g != 0, g
    z = np.abs(z) if c.scoring_func == "abs_softmax" else z
    p = {"sigmoid": sigmoid, "identity": lambda z: z, "sparsemax": sparsemax}.get(c.scoring_func, softmax)(z)
    kept = np.ones(len(p), bool)
    if top_k is not None:
        order = np.argsort(-z, kind="stable")
        kept[order[top_k:]] = False
        for place, e in enumerate(order):
            if c.top_p is not None and sum(p[f] for f in order[: place + 1]) <= c.top_p:
                kept[e] = True
        if c.entropy_threshold is not None and entropy(p, c) > c.entropy_threshold:
            kept[:] = True
    elif tau is not None:
        kept = p >= tau
    g = np.where(kept, p - tau if c.adaptive_threshold else p, 0)
    return p, kept, g / g.sum() if c.norm_topk_prob and g.sum() > 0 else g


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


def sparsemax(z: np.ndarray) -> np.ndarray:
    """The probabilities nearest to z, by algorithm 1 of arXiv:1602.02068."""
    descending = np.sort(z)[::-1]
    k = max(k for k in range(1, len(z) + 1) if 1 + k * descending[k - 1] > sum(descending[:k]))
    return np.maximum(z - (sum(descending[:k]) - 1) / k, 0)


def entropy(p: np.ndarray, c: MoeLoraConfig) -> float:
    """H of the probabilities p, divided by the H of equal ones."""
    shifted, q = p + c.entropy_eps, c.entropy_index
    if q == 1:
        return -sum(v * np.log(v) for v in shifted if v > 0) / np.log(len(p))
    return (1 - sum(v**q for v in shifted)) / (1 - len(p) * (1 / len(p)) ** q)


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))  # of very negative x, too
