"""What the routers do with every token of a text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_lora_interop.errors import ConfigError, expected
from moe_lora_jax.adapters.projections import by_projection
from moe_lora_jax.measure.router_statistics import topic_information
from moe_lora_jax.train.batches import eval_batches
from moe_lora_jax.train.data import Example, TokenData, check_vocabulary
from moe_lora_jax.train.evaluation import run_batches, split_for_evaluation
from moe_lora_jax.train.health import gate_shares
from moe_lora_jax.train.step import Batch
from moe_lora_jax.train.tokenizer import pieces, text_ids

BATCH_SIZE = 8
MODULES = 3


@dataclass(frozen=True)
class TextGates:
    """The gates over one text.

    tokens: as text; joined they are the decoded text. Of a character that takes several tokens, the last one has it.
    shares: {module: [token, expert]}, a token's gates without their signs divided by their sum, the mean over splits;
        a row is 0 where no expert is kept.
    """

    tokens: tuple[str, ...]
    shares: Mapping[str, np.ndarray]

    def of(self, modules: str | Sequence[str] | None) -> "TextGates":
        """Of these routers only; None: of the three that tell these tokens apart best.

        Raises:
            ConfigError: some of them have no router; each is listed.
        """
        if modules is None:
            modules = most_telling(token_information([self]), MODULES)
        names = [modules] if isinstance(modules, str) else list(modules)
        if missing := [name for name in names if name not in self.shares]:
            problems = [f"modules: found {name!r}, {expected(name, self.shares)}" for name in missing]
            raise ConfigError("no such router", problems)
        return TextGates(self.tokens, {name: self.shares[name] for name in names})


def joined(texts: Sequence[TextGates]) -> TextGates:
    """Texts of the same routers, one behind the other."""
    shares = {module: np.concatenate([text.shares[module] for text in texts]) for module in texts[0].shares}
    return TextGates(tuple(token for text in texts for token in text.tokens), shares)


def text_gates(model: Any, tokenizer: Any, text: str) -> TextGates:
    """Runs `model` over a text, with the special tokens that training adds.

    Raises:
        ConfigError: the text has no tokens, or no router reads it.
        DataError: token ids that the model has no row for.
    """
    return gates_of_ids(model, tokenizer, [np.array(text_ids(tokenizer, text), np.int32)])[0]


def gates_of_ids(model: nnx.Module, tokenizer: Any, texts: Sequence[np.ndarray]) -> list[TextGates]:
    """The same of several texts, each given as token ids [seq]."""
    config = getattr(model, "moe_lora_config", None)
    problems = [f"text {n}: found no tokens, expected at least one" for n, ids in enumerate(texts, 1) if not len(ids)]
    if config is not None and config.router_input == "task":
        problems.append("router_input: found task, expected hidden: such gates follow a task id, whatever the text is")
    if problems:
        raise ConfigError("no gates of a text", problems)
    examples = tuple(Example(ids, np.ones(len(ids), bool), line) for line, ids in enumerate(texts, 1))
    check_vocabulary(TokenData(Path("text"), examples), model)
    hosts = list(eval_batches(examples, batch_size=BATCH_SIZE, pad_id=0))
    found: dict[int, TextGates] = {}
    for host, shares in zip(
        hosts, run_batches(_shares, *split_for_evaluation(model), (h.batch for h in hosts)), strict=True
    ):
        for row, line in enumerate(host.lines):
            if line > 0:
                ids = texts[line - 1]
                tokens = tuple(pieces(tokenizer, ids.tolist()))
                found[line] = TextGates(tokens, {module: s[row, : len(ids)] for module, s in shares.items()})
    if not found or not found[1].shares:
        raise ConfigError("no gates of a text", ["model: found no router, expected an adapter with one"])
    return [found[line] for line in range(1, len(texts) + 1)]


def token_information(texts: Sequence[TextGates]) -> dict[str, float]:
    """{module: mutual information of token and expert in bits}, all tokens of the texts equally likely."""
    bits = {}
    for module, shares in joined(texts).shares.items():
        rows = shares[shares.sum(axis=-1) > 0].astype(np.float64)
        bits[module] = topic_information(rows / rows.sum(axis=-1, keepdims=True)) if len(rows) else 0.0
    return bits


def most_telling(bits: Mapping[str, float], count: int) -> list[str]:
    """The modules with the most information, at most `count`, in the model's order."""
    best = set(sorted(bits, key=lambda module: -bits[module])[:count])
    return [module for layers in by_projection(bits).values() for module in layers.values() if module in best]


def _shares(model: Any, batch: Batch) -> dict[str, jax.Array]:
    """{module: [batch, seq, expert]}."""
    _, router = model(batch.input_ids, attention_mask=batch.attention_mask, return_router=True)
    shares = {module: gate_shares(out.gates) for module, out in router.items()}
    return {module: jnp.mean(s, axis=2) if s.ndim == 4 else s for module, s in shares.items()}
