"""What the page says: one function per section, each with its figure or the reason why there is none."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_lora_jax.measure.router_statistics import RouterStatistics, topic_information
from moe_lora_jax.report.comparison_sections import compared, hyperparameters
from moe_lora_jax.report.curves import Records, plot_balance, plot_entropy, plot_losses
from moe_lora_jax.report.findings import Asked, Findings
from moe_lora_jax.report.heat_maps import plot_router, plot_similarity, plot_topics
from moe_lora_jax.report.page import Section
from moe_lora_jax.report.similarity import delta_similarity, mean_pairs
from moe_lora_jax.report.text_sections import losses_on_data, samples, tokens


def all_sections(asked: Asked, base: Findings, found: Findings, against: Findings | None = None) -> list[Section]:
    """Every section in its order; what a finding has a string for is said to be missing, with this reason."""
    config, records = found.adapter.config, found.records
    both = [found] if against is None else [found, against]
    return [
        losses_on_data([base, *both]),
        samples(asked, [base, *both]),
        tokens(both),
        usage(found.statistics),
        topics(found.statistics),
        entropy(found.statistics, None if config.top_k_pattern or config.keeps_more else config.top_k),
        similarity(delta_similarity(found.adapter)),
        losses(records if against is None else {f.name: f.records for f in both}),
        balance(records),
        *([] if against is None else [compared(found, against)]),
        hyperparameters(found),
    ]


def usage(statistics: RouterStatistics | str) -> Section:
    text = (
        "The part of the gate weight that each expert receives, per layer. The line in the colour bar marks uniform "
        "use; an expert near zero is hardly used there."
    )
    if isinstance(statistics, str):
        return Section("usage", "Use of the experts", text, missing=statistics)
    largest = max(statistics.shares, key=lambda module: statistics.shares[module].max())
    shares = statistics.shares[largest]
    alt = (
        "Heat maps of the share of gate weight, one per projection, layers down, experts across. Largest: expert "
        f"{shares.argmax()} of {largest} with {shares.max():.0%}; uniform would be {1 / len(shares):.1%}."
    )
    return Section("usage", "Use of the experts", text, plot_router(statistics), alt)


def topics(statistics: RouterStatistics | str) -> Section:
    text = (
        "The same per topic of the data, where the router separates the topics best, and for every module how much an "
        "expert tells about the topic (mutual information, topics equally likely)."
    )
    if isinstance(statistics, str):
        return Section("topics", "Topics", text, missing=statistics)
    if len(statistics.topics) < 2:
        missing = 'No topics: found fewer than two values of the key "topic" in the lines of the data.'
        return Section("topics", "Topics", text, missing=missing)
    best = max(statistics.by_topic, key=lambda module: topic_information(statistics.by_topic[module]))
    favourites = ", ".join(
        f"{topic} uses expert {row.argmax()} most ({row.max():.0%})"
        for topic, row in zip(statistics.topics, statistics.by_topic[best], strict=True)
    )
    return Section("topics", "Topics", text, plot_topics(statistics), f"Heat map of {best}: {favourites}.")


def entropy(statistics: RouterStatistics | str, top_k: int | None) -> Section:
    text = "How many experts one token's gates are spread over: 0 is a single expert, 1 is all experts alike."
    if isinstance(statistics, str):
        return Section("entropy", "Entropy of the gates", text, missing=statistics)
    low, high = (choose(statistics.entropy, key=lambda m: statistics.entropy[m]) for choose in (min, max))
    alt = (
        f"Entropy by layer, one line per projection: lowest {statistics.entropy[low]:.2f} in {low}, "
        f"highest {statistics.entropy[high]:.2f} in {high}."
    )
    return Section("entropy", "Entropy of the gates", text, plot_entropy(statistics, top_k=top_k), alt)


def similarity(found: Mapping[str, np.ndarray]) -> Section:
    text = (
        "The cosine between the weight changes of two experts of a module. Experts with cosine 1 do the same; "
        "hatched cells have no value."
    )
    means = {module: mean_pairs(matrix) for module, matrix in found.items()}
    known = {module: mean for module, mean in means.items() if np.isfinite(mean)}
    if not known:
        reason = "every module has one expert" if not found else "every change is zero: the adapter is not trained"
        return Section("similarity", "Likeness of the experts", text, missing=f"Nothing to compare: {reason}.")
    most = max(known, key=lambda module: known[module])
    mean = np.mean(list(known.values()))
    alt = f"Heat maps of cosine similarity; on average {mean:.2f}, most in {most}, {known[most]:.2f}."
    return Section("similarity", "Likeness of the experts", text, plot_similarity(found), alt)


def losses(records: Records | str | Mapping[str, Records | str]) -> Section:
    """Of one run, or of several by name."""
    text = "Mean negative log-likelihood of the tokens with loss; the training line is single batches."
    runs = records if isinstance(records, Mapping) else {"": records}
    known = {name: lines for name, lines in runs.items() if not isinstance(lines, str)}
    missing = " ".join(f"{name}: {why}" if name else why for name, why in runs.items() if isinstance(why, str))
    if not known:
        return Section("loss", "Loss", text, missing=missing)
    alt = " ".join(f"{name}: {_ends(lines)}" if name else _ends(lines) for name, lines in known.items())
    return Section("loss", "Loss", text, plot_losses(known), alt, missing)


def balance(records: Records | str) -> Section:
    text = (
        "Over training: the largest share that one expert of any module received, the mean entropy of the gates, and "
        "the experts that received less than 1 % of a uniform share."
    )
    if isinstance(records, str):
        return Section("balance", "Load balance", text, missing=records)
    routed: list[Any] = [r for r in records if "router_entropy" in r]
    if not routed:
        return Section("balance", "Load balance", text, missing="The records have no router: one expert per module.")
    alt = (
        f"Largest share {routed[0]['router_largest_share']:.0%} at step {routed[0]['step']}, "
        f"{routed[-1]['router_largest_share']:.0%} at step {routed[-1]['step']}; "
        f"dead experts at the end: {routed[-1]['router_dead_experts']}."
    )
    return Section("balance", "Load balance", text, plot_balance(records), alt)


def _ends(records: Records) -> str:
    parts = []
    for key, name in (("lm_loss", "Training loss"), ("eval_loss", "Evaluation loss")):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            (first, start), (last, end) = points[0], points[-1]
            parts.append(f"{name} {start:.3g} at step {first}, {end:.3g} at step {last}.")
    return " ".join(parts)
