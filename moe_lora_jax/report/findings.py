"""What the report asks of a model: the base, the adapter, and perhaps another adapter beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.checkpoint.run_records import read_metrics, read_settings
from moe_lora_interop.progress import OnProgress, no_progress
from moe_lora_jax.measure.router_statistics import RouterStatistics, router_statistics
from moe_lora_jax.measure.samples import Prompt, answers
from moe_lora_jax.measure.text_gates import TextGates, gates_of_ids
from moe_lora_jax.measure.verdict import Verdict, verdict
from moe_lora_jax.models import CausalLM
from moe_lora_jax.report.curves import Records
from moe_lora_jax.train.data import TokenData
from moe_lora_jax.train.evaluation import evaluate
from moe_lora_jax.tree import has_adapter

SAMPLES = 4
TEXTS = 3
TEXT_TOKENS = 160


@dataclass(frozen=True)
class Asked:
    """The same for every model. data: for the loss. topics: the same data by topic. prompts: may be empty."""

    tokenizer: Any
    pad_id: int
    data: TokenData
    topics: Mapping[str, TokenData]
    prompts: Sequence[Prompt]
    max_new_tokens: int

    @property
    def texts(self) -> list[np.ndarray]:
        """The starts of some examples, of every topic in turn."""
        by_rank = [list(data.examples[:TEXTS]) for data in self.topics.values()]
        in_turn = [examples[n] for n in range(TEXTS) for examples in by_rank if n < len(examples)]
        return [example.ids[:TEXT_TOKENS] for example in in_turn[:TEXTS]]


@dataclass(frozen=True)
class Findings:
    """What was found for one model; a string in place of something says why there is none. adapter: None for the base.
    answers: one per prompt. settings: of its training, empty if there are no records.
    """

    name: str
    adapter: Any
    loss: float | str
    answers: Sequence[str] | str
    statistics: RouterStatistics | str
    texts: Sequence[TextGates] | str
    records: Records | str = "There are no records of the training."
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """On the routers."""
        return verdict(self.statistics, self.adapter.config, learning_rate=self.settings.get("learning_rate"))


def find(
    model: CausalLM,
    asked: Asked,
    *,
    name: str,
    adapter: Adapter | None = None,
    directory: Path | None = None,
    on_progress: OnProgress = no_progress,
) -> Findings:
    """Runs `model`, with the adapter from `directory` on it or without one.

    Args:
        on_progress: called with (done, total) in batches of the routers' statistics.

    Raises:
        DataError: token ids that the model has no row for.
    """
    by_task = "This adapter routes by a task id, which the data does not have."
    no_router = "This adapter has no router: one expert per module."
    if adapter is not None and adapter.config.router_input == "task":
        return Findings(name, adapter, by_task, by_task, by_task, by_task, **_recorded(directory))
    loss = evaluate(model, asked.data, pad_id=asked.pad_id)
    said: list[str] = []
    if asked.prompts:
        prompts = [prompt.ids for prompt in asked.prompts]
        said = answers(model, asked.tokenizer, prompts, max_new_tokens=asked.max_new_tokens, adapter=directory)
    if adapter is None or not has_adapter(model) or not adapter.routed:
        return Findings(name, adapter, loss, said, no_router, no_router, **_recorded(directory))
    statistics = router_statistics(model, asked.topics, pad_id=asked.pad_id, on_progress=on_progress)
    texts = gates_of_ids(model, asked.tokenizer, asked.texts)
    return Findings(name, adapter, loss, said, statistics, texts, **_recorded(directory))


def _recorded(directory: Path | None) -> dict[str, Any]:
    """Of the training, where the directory is that of a run."""
    if directory is None:
        return {}
    found: dict[str, Any] = {"settings": read_settings(directory)}
    if records := read_metrics(directory):
        found["records"] = records
    return found
