"""Rows of several examples: how they are planned, and runs that train on them."""

import json
import logging
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import arrays, compiled_once, tiny_base, tiny_model, token_data  # noqa: F401

import moe_lora_jax as mlj
from moe_lora_jax.train import loop as loop_module
from moe_lora_jax.train.batches import TrainBatches, bucket_lengths, collate_packed, padding_share
from moe_lora_jax.train.errors import TrainingError
from moe_lora_jax.train.examples import Example
from moe_lora_jax.train.loop import train
from moe_lora_jax.train.packing import PackedRows, best_fit, training_rows
from moe_lora_jax.train.settings import TrainSettings

pytestmark = pytest.mark.usefixtures("compiled_once")
DATA = replace(token_data(40), max_length=48)
NOISY = {"lora_dropout": 0.2, "router_jitter_noise": 0.05, "router_aux_loss_coef": 0.01}

REPEATABLE = settings(max_examples=300, deadline=None, database=None, derandomize=True)

plans = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), min_size=1, max_size=60))
)


def one_by_one(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit as it is described: each into the fullest row that has space."""
    rows: list[list[int]] = []
    for length in lengths:
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def next_fit(lengths: list[int], capacity: int) -> int:
    rows, filled = 1, 0
    for length in lengths:
        if filled + length > capacity:
            rows, filled = rows + 1, 0
        filled += length
    return rows


@REPEATABLE
@given(plans)
def test_the_plan_is_best_fit_decreasing(plan):
    capacity, lengths = plan
    ordered = sorted(lengths, reverse=True)
    rows = best_fit(np.array(ordered), capacity)
    found = [[length for length, row in zip(ordered, rows, strict=True) if row == n] for n in range(rows.max() + 1)]
    # of two rows that are equally full either is right, so which examples are together may differ
    assert sorted(map(sum, found)) == sorted(map(sum, one_by_one(ordered, capacity)))
    assert all(0 < sum(row) <= capacity for row in found)
    assert sum(2 * sum(row) <= capacity for row in found) <= 1  # two of them would have been one
    assert len(found) <= 11 / 9 * next_fit(lengths, capacity) + 6 / 9  # which is no better than the best there is


@REPEATABLE
@given(plans, st.integers(0, 3))
def test_every_example_is_in_one_row_and_the_seed_decides_alone(plan, seed):
    capacity, lengths = plan
    made = [Example(np.full(n, 3, np.int32), np.ones(n, bool), i) for i, n in enumerate(lengths, start=1)]
    rows, again = (PackedRows(made, capacity, seed=seed) for _ in range(2))
    found = [[e.line for e in row] for row in rows]
    assert sorted(line for row in found for line in row) == list(range(1, len(lengths) + 1))
    assert found == [[e.line for e in again[i]] for i in range(len(again))]
    assert [e.line for e in rows[-1]] == found[-1] and rows.tokens == sum(lengths)
    assert rows.longest == max(sum(len(e.ids) for e in row) for row in rows) <= capacity


def test_equally_long_examples_are_mixed_by_the_seed():
    made = token_data(64, low=8, high=9).examples
    one, other = ([sorted(e.line for e in row) for row in PackedRows(made, 32, seed=seed)] for seed in (0, 1))
    assert len(one) == len(other) == 16 and sorted(one) != sorted(other)


def test_a_packed_batch_holds_its_examples_and_no_first_token_counts():
    rows = PackedRows(DATA.examples, 48, seed=0)
    batch, lines = collate_packed(rows[:3], 5, bucket_lengths(48), 63)
    assert batch.input_ids.shape == (5, 48) and lines.tolist() == [e.line for r in rows[:3] for e in r] + [0, 0]
    for number, row in enumerate(rows[:3]):
        begin = 0
        for segment, e in enumerate(row, start=1):
            here = slice(begin, begin + len(e.ids))
            np.testing.assert_array_equal(batch.input_ids[number, here], e.ids)
            np.testing.assert_array_equal(batch.loss_mask[number, here][1:], e.counted[1:])
            assert not batch.loss_mask[number, begin]
            assert (batch.segment_ids[number, here] == segment).all()
            begin = here.stop
        assert not batch.segment_ids[number, begin:].any() and (batch.input_ids[number, begin:] == 63).all()
    np.testing.assert_array_equal(batch.attention_mask, batch.segment_ids > 0)
    assert not batch.attention_mask[3:].any() and not batch.loss_mask[3:].any()


def test_the_padding_of_a_run_that_packs_nothing():
    lengths = np.array([len(e.ids) for e in DATA.examples])
    batches = TrainBatches(DATA.examples, batch_size=4, gradient_accumulation=1, epochs=20, seed=0, pad_id=0)
    masks = [host.batch.attention_mask for host in batches]
    share = 1 - sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)
    assert padding_share(lengths, 4, 0) == pytest.approx(share, abs=0.05)
    assert padding_share(np.array([3]), 4, 0) == pytest.approx(5 / 8)


def settings(**fields) -> TrainSettings:
    fixed = {"epochs": 2, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-2, "log_every": 1}
    return TrainSettings(**{**fixed, "packing": True, **fields})


def metrics(out) -> list[dict]:
    lines = (out / "training" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def test_a_packed_run_counts_rows_and_goes_on_in_the_middle_of_an_epoch_to_the_bit(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "moe_lora_jax")
    rows = training_rows(DATA, settings())
    assert (len(rows), rows.length) == (11, 48) and sum(len(row) for row in rows) == 40
    reference = tiny_model(**NOISY)
    result = train(reference, DATA, tmp_path / "straight", settings())
    assert result.total_steps == result.step == 6  # 2 x 11 rows in fours
    assert [r.getMessage() for r in caplog.records] == [rows.describe()]
    assert rows.describe() == f"packing: 40 examples in 11 rows of 48 tokens, {rows.tokens / 528:.1%} full"
    advance = loop_module._Loop.advance

    def advance_and_kill(self, show):
        advance(self, show)
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module._Loop, "advance", advance_and_kill)
        stopped = train(tiny_model(**NOISY), DATA, tmp_path / "stopped", settings())
    assert (stopped.step, stopped.total_steps) == (4, 6)
    model = tiny_model(**NOISY)
    train(model, DATA, tmp_path / "stopped", settings(resume=True))
    for path, value in arrays(reference).items():
        np.testing.assert_array_equal(arrays(model)[path], value, err_msg=path)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    # another plan is another run
    for data, fields, problem in (
        (DATA, {"packing": False}, "settings.packing: found None, the run has True"),
        (replace(DATA, max_length=64), {}, "row_length: found 64, the run has 48"),
    ):
        with pytest.raises(TrainingError, match=problem):
            train(tiny_model(**NOISY), data, tmp_path / "stopped", settings(resume=True, **fields))
    caplog.clear()
    longer = train(tiny_model(**NOISY), DATA, tmp_path / "stopped", settings(resume=True, epochs=3))
    assert longer.total_steps == 9  # 33 rows
    assert "step 6 was 2 rows short, which the next epoch leaves out" in caplog.text


def test_all_lines_of_a_packed_batch_are_named_when_the_loss_is_not_finite(tmp_path):
    model = tiny_model()
    embedding = model.model.embed_tokens.embedding
    embedding[...] = embedding[...].at[7].set(np.nan)
    poisoned = [e.line for e in DATA.examples if 7 in e.ids]
    with pytest.raises(TrainingError) as caught:
        train(model, DATA, tmp_path, settings(batch_size=11, gradient_accumulation=1))
    named = str(caught.value).split("batch: lines ")[1].split(" of ")[0].split(", ")
    assert list(map(int, named)) == list(range(1, 41)) and poisoned


def test_much_padding_is_said_once(tmp_path, caplog):
    short, long = token_data(16, low=3, high=6), token_data(4, seed=1, low=60, high=64)
    data = replace(short, examples=(*short.examples, *long.examples))
    train(tiny_model(), data, tmp_path / "apart", settings(packing=False, epochs=1))
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.endswith("% of the batches is padding: packing fills rows with several examples")
    caplog.clear()
    train(tiny_model(), data, tmp_path / "packed", settings(epochs=1))
    assert not caplog.records


class WithoutSegments(nnx.Module):
    """A model of someone's own, which reads a row as one sequence."""

    def __init__(self):
        self.inner = tiny_base()

    def __call__(self, input_ids, attention_mask=None, *, return_router=False):
        return self.inner(input_ids, attention_mask, return_router=return_router)


def test_a_model_that_takes_no_segments_is_refused_before_anything_is_written(tmp_path):
    config = mlj.MoeLoraConfig(r=2, num_experts=2, target_modules=["q_proj"])
    model = mlj.apply_moe_lora(WithoutSegments(), config, rngs=nnx.Rngs(0))
    with pytest.raises(TrainingError, match="found True with WithoutSegments, whose call takes no segment_ids"):
        train(model, DATA, tmp_path / "out", settings())
    assert not (tmp_path / "out").exists()
