"""Sections of the page to read: the loss on the data, what the models answer, and texts coloured by expert."""

from collections.abc import Sequence

from moe_lora_jax.measure.router_statistics import topic_information
from moe_lora_jax.measure.tables import html_table
from moe_lora_jax.measure.text_gates import MODULES, most_telling, token_information
from moe_lora_jax.report.findings import TEXT_TOKENS, Asked, Findings
from moe_lora_jax.report.page import Section
from moe_lora_jax.report.tokens import tokens_html


def losses_on_data(found: Sequence[Findings]) -> Section:
    text = "Mean negative log-likelihood of the tokens with loss of the data on which this page was made."
    known = [[f.name, f"{f.loss:.4f}"] for f in found if not isinstance(f.loss, str)]
    missing = " ".join(f"{f.name}: {f.loss}" for f in found if isinstance(f.loss, str))
    content = f'<div class="numbers">{html_table("", ["", "nats per token"], known)}</div>'
    return Section("data_loss", "Loss on the data", text, missing=missing, content=content)


def samples(asked: Asked, found: Sequence[Findings]) -> Section:
    title, text = "Before and after", "What the models answer, taking the likeliest token at every step."
    if not asked.prompts:
        missing = "No prompts: found only whole texts in the data; give some with --prompt TEXT."
        return Section("samples", title, text, missing=missing)
    known = [f for f in found if not isinstance(f.answers, str)]
    missing = " ".join(f"{f.name}: {f.answers}" for f in found if isinstance(f.answers, str))
    tables = []
    for number, prompt in enumerate(asked.prompts):
        rows = [["in the data", _text(asked, prompt.expected)]] if prompt.expected else []
        rows += [[f.name, f.answers[number].strip()] for f in known]
        tables.append(html_table("", ["prompt", _text(asked, prompt.ids)], rows))
    content = f'<div class="words">{"".join(tables)}</div>'
    return Section("samples", title, text, missing=missing, content=content)


def tokens(found: Sequence[Findings]) -> Section:
    """Of the routers that tell the topics, or else the tokens, apart best in the first of the findings."""
    title, first, statistics = "Experts over text", found[0].texts, found[0].statistics
    text = (
        f"Some examples of the data, up to {TEXT_TOKENS} tokens of each. A token has the colour and the number of the "
        "expert with its largest gate, the stronger the larger; hover it for its gates."
    )
    if isinstance(first, str) or isinstance(statistics, str):
        return Section("tokens", title, text, missing=str(first))
    if len(statistics.topics) > 1:
        bits, what = {m: topic_information(rows) for m, rows in statistics.by_topic.items()}, "topics"
    else:
        bits, what = token_information(first), "tokens"
    content, missing = "", []
    for module in most_telling(bits, MODULES):
        for f in found:
            before = f"{f.name}: " if len(found) > 1 else ""
            if isinstance(f.texts, str):
                missing.append(f"{f.name}: {f.texts}")
            elif module in f.texts[0].shares:
                content += tokens_html([one.of(module) for one in f.texts], before=before)
            else:
                missing.append(f"{f.name} has no router at {module}.")
    text += f" These routers tell the {what} apart best."
    return Section("tokens", title, text, missing=" ".join(dict.fromkeys(missing)), content=content)


def _text(asked: Asked, ids: Sequence[int]) -> str:
    return asked.tokenizer.decode(ids, skip_special_tokens=True).strip()
