"""Sections of the page about numbers in tables: two adapters side by side, and the hyperparameters."""

import dataclasses
from html import escape

from moe_lora_interop.config.adapter_config import BOOKKEEPING, MoeLoraConfig
from moe_lora_interop.config.in_words import routing_in_words
from moe_lora_jax.measure.comparison import comparison, in_words, modules_in_words
from moe_lora_jax.measure.tables import html_table
from moe_lora_jax.measure.text_gates import joined
from moe_lora_jax.report.findings import Findings
from moe_lora_jax.report.page import Section

LONGEST = 20
"""Rows of a table that is shown at once; a longer one is opened by a click."""
ALWAYS = ("r", "lora_alpha", "num_experts", "top_k", "router_aux_loss_coef")


def compared(found: Findings, against: Findings) -> Section:
    text = (
        f"{found.name} beside {against.name}. The verdict on {against.name}: {against.verdict}. Cosines are over all "
        "numbers of a tensor; gates differ by half the sum of |g - h|, 0 being alike and 1 disjoint, the mean over the "
        "tokens of the texts above."
    )
    both = found, against
    gates = [joined(f.texts) for f in both if not isinstance(f.texts, str)]
    made = comparison(
        (found.name, against.name),
        [f.adapter for f in both],
        [f.settings for f in both],
        gates if len(gates) == 2 else [],
        {},
    )
    content = "".join(_foldable(*table) for table in made.tables())
    return Section("comparison", "Side by side", text, content=content)


def hyperparameters(found: Findings) -> Section:
    text = "Of the adapter, what is not the default; of its training, what was recorded."
    config, defaults = found.adapter.config, MoeLoraConfig()
    rows = [["modules", modules_in_words(found.adapter.modules)], ["routing", routing_in_words(config)]]
    for f in dataclasses.fields(MoeLoraConfig):
        value = getattr(config, f.name)
        said = f.name in ALWAYS or value != getattr(defaults, f.name)
        if said and f.name not in BOOKKEEPING and f.name != "target_modules":
            rows.append([f.name, in_words(value)])
    rows += [[f"training: {name}", in_words(value)] for name, value in found.settings.items()]
    missing = "" if found.settings else "There are no records of the training."
    table = f'<div class="words">{html_table("", ["", "value"], rows)}</div>'
    return Section("hyperparameters", "Hyperparameters", text, missing=missing, content=table)


def _foldable(title: str, header: list[str], rows: list[list[str]]) -> str:
    kind = "words" if title.startswith("config") else "numbers"
    table = html_table(title if len(rows) <= LONGEST else "", header, rows)
    if len(rows) > LONGEST:
        table = f"<details><summary>{escape(title)}: {len(rows)} rows</summary>{table}</details>"
    return f'<div class="{kind}">{table}</div>'
