"""The comparison of methods: its data, its plan, its statistics, and a whole run on a tiny model."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import moe_lora_jax as mlj
from benchmarks import llama
from benchmarks.effect import __main__ as effect
from benchmarks.effect import data as effect_data
from benchmarks.effect.bootstrap import interval, mean, test_values
from benchmarks.effect.knockout import favourites, own_and_others, without
from benchmarks.effect.methods import METHODS
from benchmarks.effect.plan import GRID, RATES, SEEDS, Run, final_rows, next_run
from benchmarks.effect.rows import ROWS, read_rows
from benchmarks.effect.score import score
from benchmarks.effect.session import Session, Settings, batches
from benchmarks.effect.table import RESULTS, replaced, tables
from benchmarks.effect.tasks import Item
from moe_lora_jax.models.config import DecoderConfig
from moe_lora_jax.train.data import Example

SMOLLM2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,  # all 30 are alike
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 64,  # not adapted
    "tie_word_embeddings": True,
}


def toy_tasks() -> dict[str, list[Item]]:
    """Two tasks on the same keys, in letters."""
    words = [f"{a}{b}" for a in "abcdefgh" for b in "klmnopqr"]
    return {
        "reverse": [Item(w, f"r {w}", w[::-1]) for w in words],
        "double": [Item(w, f"d {w}", w + w) for w in words],
    }


def encode(text: str) -> list[int]:
    return [1 + ord(c) % 96 for c in text]


@pytest.fixture(scope="module")
def data():
    return effect_data.build(toy_tasks(), encode, 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return llama.save(tmp_path_factory.mktemp("base"), quick=True)


def test_no_key_is_in_two_splits(data):
    keys = [
        {bytes(e.ids[2:4].astype(np.int8)) for examples in split.values() for e in examples}
        for split in (data.train, data.validation, data.test)
    ]
    assert all(keys) and sum(map(len, keys)) == len(set.union(*keys))


def test_the_answer_and_its_end_are_counted(data):
    (item, *_) = toy_tasks()["double"]
    (example,) = (e for split in (data.train, data.validation, data.test) for e in split["double"] if starts(e, item))
    assert example.ids[~example.counted].tolist() == encode(item.prompt)
    assert example.ids[example.counted].tolist() == [*encode(f" {item.answer}"), 0]


def starts(example: Example, item: Item) -> bool:
    return example.ids[: len(item.prompt)].tolist() == encode(item.prompt)


def test_long_items_are_left_out_and_counted():
    items = {"long": [Item(str(n), "p" * n, "a") for n in range(1, 30)]}
    found = effect_data.build(items, encode, 0)
    kept = sum(len(split["long"]) for split in (found.train, found.validation, found.test))
    assert kept == effect_data.LENGTH - 3 and found.left_out == {"long": 29 - kept}


def test_methods_have_equal_parameters():
    """Counted on a model of SmolLM2-135M's layers, without their memory."""
    config = DecoderConfig.from_hf(SMOLLM2, name_or_path="")

    def count(method: str) -> int:
        def build() -> nnx.Module:
            return mlj.apply_moe_lora(mlj.CausalLM(config, rngs=nnx.Rngs(0)), METHODS[method], rngs=nnx.Rngs(1))

        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(build), mlj.MoeLoraParam)))

    counts = {method: count(method) for method in METHODS}
    others = {m: n / counts["lora"] for m, n in counts.items() if m != "lora_r"}
    assert all(0.98 <= ratio <= 1.02 for ratio in others.values()), others
    assert counts["lora"] == 9 * counts["lora_r"]


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_tunes_each_method_and_widens_the_grid_at_its_edge():
    def loss(run: Run) -> float:
        best = {"middle": 1e-3, "edge": 1e-2, "last": 3e-2}[run.method]
        return abs(np.log(run.learning_rate / best)) + 0.01 * run.seed

    rows: list[dict] = []
    while (run := next_run(rows, ["middle", "edge", "last"])) is not None:
        assert run not in [Run(r["method"], r["learning_rate"], r["seed"]) for r in rows]
        rows.append({**run._asdict(), "validation_loss": loss(run)})
    tried = {
        m: sorted(r["learning_rate"] for r in rows if r["method"] == m and r["seed"] == 0)
        for m in "middle edge last".split()
    }
    assert tried == {"middle": list(GRID), "edge": [*GRID, 1e-2, 3e-2], "last": [*GRID, 1e-2, 3e-2]}
    for method, rate in (("middle", 1e-3), ("edge", 1e-2), ("last", RATES[-1])):
        assert [(r["learning_rate"], r["seed"]) for r in final_rows(rows, method)] == [(rate, s) for s in SEEDS]


# --- the statistics ---------------------------------------------------------------------------------------------------


def test_the_interval_of_independent_items_is_that_of_the_normal_distribution():
    values = {"task": np.random.default_rng(0).normal(2.0, 1.0, (1, 400))}
    low, high = interval(values)
    half = 1.96 * values["task"].std() / 20
    assert mean(values) == pytest.approx(values["task"].mean())
    assert (high - low) / 2 == pytest.approx(half, rel=0.05) and (high + low) / 2 == pytest.approx(
        mean(values), abs=0.01
    )


def test_the_difference_is_paired_by_item():
    first = {"task": np.random.default_rng(0).normal(size=(1, 100))}
    low, high = interval({"task": first["task"] + 0.5}, first)
    assert low == pytest.approx(0.5) and high == pytest.approx(0.5)


def test_the_permutation_test_finds_a_diagonal_and_no_other():
    random = np.random.default_rng(0)
    noise = random.normal(size=(8, 8))
    own, others, p = own_and_others(noise + 5 * np.eye(8))
    assert own - others > 3 and p < 0.001
    assert own_and_others(noise)[2] > 0.05
    assert own_and_others(np.roll(noise + 5 * np.eye(8), 1, axis=1))[2] > 0.5


# --- scoring ----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_greedy_decoding(base):
    """An example with the model's own continuation is right, with another token wrong; the loss is -log p."""
    model = mlj.load_base_model(base)
    graphdef, state = nnx.split(model)
    prompt = np.array([[5, 9, 3, 7]], np.int32)
    written = np.asarray(mlj.generate(model, prompt, max_new_tokens=4, eos_token_id=()))[0][:8]
    other = written.copy()
    other[6] = (other[6] + 1) % 96
    counted = np.arange(8) >= 4
    examples = [Example(ids.astype(np.int32), counted, 1) for ids in (written, other)]
    found = score(graphdef, state, examples, 12)
    assert found.correct.tolist() == [True, False]
    for ids, loss in zip((written, other), found.loss, strict=True):
        logits = np.asarray(model(ids[None]), np.float64)[0]
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        assert loss == pytest.approx(-np.mean([log_p[t - 1, ids[t]] for t in range(4, 8)]), abs=1e-4)


def test_a_knocked_out_expert_is_gone_and_the_others_stay(base):
    model = mlj.load_base_model(base)
    config = mlj.MoeLoraConfig(r=2, num_experts=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(0))
    state = nnx.split(model)[1]
    router = "model.layers.1.self_attn.v_proj"
    changed = nnx.to_flat_state(without(state, {router: 2}))
    for (path, old), (_, new) in zip(nnx.to_flat_state(state), changed, strict=True):
        if isinstance(old, nnx.RngState):
            continue
        old, new = (
            jax.random.key_data(v) if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) else v[...]
            for v in (old, new)
        )
        if ".".join(map(str, path[:-1])) == router and path[-1] == "lora_b":
            assert not np.any(new[2]) and np.any(old[2])
            old, new = old[:2], new[:2]
        np.testing.assert_array_equal(old, new)


def test_the_favourite_is_the_most_specific_expert():
    shares = {"m": np.array([[0.6, 0.3, 0.1], [0.6, 0.1, 0.3]])}  # expert 0 is everybody's, and so nobody's
    assert favourites(shares)["m"].tolist() == [1, 2]


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(base, data, tmp_path_factory):
    """All runs of two small methods; stopped once and continued."""
    fields = dict(r=2, target_modules=["q_proj", "v_proj"])
    methods = {
        "lora": mlj.MoeLoraConfig(num_experts=1, **fields),
        "top2": mlj.MoeLoraConfig(num_experts=3, top_k=2, router_aux_loss_coef=0.01, **fields),
    }
    file = tmp_path_factory.mktemp("effect") / "rows.jsonl"
    general = {"text": [Example(np.arange(1, 65, dtype=np.int32), np.ones(64, bool), 1)]}
    settings = Settings(steps=4, batch=4, warmup=1)
    assert not effect.complete(base, file, data, general, methods, settings, end=0.0)
    assert not file.exists()
    assert effect.complete(base, file, data, general, methods, settings, end=float("inf"))
    lines = file.read_text()
    assert effect.complete(base, file, data, general, methods, settings, end=float("inf"))
    assert file.read_text() == lines, "nothing is repeated"
    with pytest.raises(SystemExit, match="steps 4, expected 5"):
        effect.complete(base, file, data, general, methods, Settings(steps=5, batch=4, warmup=1), end=float("inf"))
    return read_rows(file)


def test_every_run_is_a_row_that_says_everything(rows, data):
    base, *others = rows
    assert [row["method"] for row in rows].count("base") == 1 and {r["method"] for r in others} == {"lora", "top2"}
    assert base["test"].keys() == data.test.keys()
    for row in others:
        assert row["data"] == data.digest and row["parameters"] > 0 and np.isfinite(row["validation_loss"])
        assert ("entropy" in row) == (row["method"] == "top2")
        assert ("knockout" in row) == (row["method"] == "top2" and row["seed"] == SEEDS[1])
        for task, found in row["test"].items():
            assert len(found["loss"]) == len(found["correct"]) == len(data.test[task])


def test_every_method_sees_the_same_batches_for_a_seed(data):
    one, same, other = (list(batches(data.train, Settings(steps=3, batch=4), seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(one, other, strict=True))


def test_training_lowers_the_loss_and_a_new_adapter_begins_at_the_base(base, data):
    session = Session(
        mlj.load_base_model(base),
        mlj.MoeLoraConfig(r=4, num_experts=2, target_modules="all-linear"),
        Settings(steps=60, batch=8),
    )
    examples = data.train["double"]
    untrained = session.score(session.state, examples, 16).loss.mean()
    first = session.train(data.train, 1e-2, 0)
    assert session.score(session.state, examples, 16).loss.mean() < untrained - 0.3
    again = session.train(data.train, 1e-2, 0)
    assert first == again


def test_the_tables_show_the_methods_and_their_numbers(rows):
    text = tables(rows)
    final = final_rows(rows, "top2")
    assert f"{100 * mean(test_values(final, 'correct')):.1f} [" in text
    assert "| top2 |" in text and "still lack runs" in text


def test_the_published_tables_are_those_of_the_published_rows():
    rows = read_rows(ROWS)
    text = RESULTS.read_text()
    assert replaced(text, tables(rows)) == text, "run: python -m benchmarks.effect.table"
    assert len({json.dumps([row[k] for k in ("data", "general", "steps", "batch")]) for row in rows}) == 1
