"""Whole runs: exact resume, signals, locks, metrics, checkpoints, and runs that must stop."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_training import arrays, compiled_once, tiny_base, tiny_model, token_data  # noqa: F401

import moe_lora_interop
import moe_lora_jax as mlj
from moe_lora_jax.train import loop as loop_module
from moe_lora_jax.train.errors import TrainingError
from moe_lora_jax.train.evaluation import evaluate
from moe_lora_jax.train.loop import train
from moe_lora_jax.train.settings import TrainSettings

pytestmark = pytest.mark.usefixtures("compiled_once")
DATA = token_data(10)
NOISY = {"lora_dropout": 0.2, "expert_dropout": 0.1, "router_jitter_noise": 0.05, "router_aux_loss_coef": 0.01}


def settings(**fields) -> TrainSettings:
    return TrainSettings(
        **{"steps": 6, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-2, "warmup_steps": 2,
           "weight_decay": 0.01, "log_every": 1, **fields}
    )  # fmt: skip


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]


def stop_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """A real signal to this process, after so many steps."""
    advance = loop_module._Loop.advance

    def advance_and_kill(self, show):
        advance(self, show)
        if self.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop_module._Loop, "advance", advance_and_kill)


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, compiled_once):  # noqa: F811
    """Six steps without interruption."""
    out = tmp_path_factory.mktemp("straight")
    model = tiny_model(**NOISY)
    result = train(model, DATA, out, settings(), eval_data=token_data(3, seed=9))
    return out, model, result


def test_a_run_writes_an_adapter_metrics_and_a_checkpoint(straight):
    out, model, result = straight
    assert result.is_finished and result.step == result.total_steps == 6
    saved = moe_lora_interop.read(out)
    for (module, role), tensor in mlj.to_adapter(model).tensors.items():
        np.testing.assert_array_equal(saved.tensors[module, role], tensor)
    assert [p.name for p in (out / "training" / "checkpoints").iterdir()] == ["6"]
    records = metrics(out)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 6]
    assert result.eval_losses == {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    step = records[3]
    np.testing.assert_allclose(step["loss"], step["lm_loss"] + 0.01 * step["load_balancing_loss"], rtol=1e-6)
    assert records[1]["learning_rate"] == pytest.approx(0.005)
    assert step["grad_norm"] > 0 and step["tokens_per_second"] > 0
    assert len(step["router"]) == 3
    assert set(step["router"]["model.layers.0.mlp.down_proj"]) == {"entropy", "largest_share", "dead_experts"}
    assert 0 < step["router_entropy"] <= 1 and 1 / 3 <= step["router_largest_share"] <= 1
    assert step["router_dead_experts"] == 0


def test_the_base_is_unchanged_bit_for_bit_and_the_model_usable(straight):
    _, model, _ = straight
    base = arrays(tiny_base())
    trained = {path.replace(".base_layer", ""): value for path, value in arrays(model, nnx.Param).items()}
    for path, value in base.items():
        np.testing.assert_array_equal(trained[path], value, err_msg=path)
    assert model(jnp.ones((1, 3), int)).shape == (1, 3, 64)
    assert np.any(np.asarray(model(jnp.ones((1, 3), int))) != np.asarray(tiny_model(**NOISY)(jnp.ones((1, 3), int))))


def test_on_eval_gets_the_adapter_of_its_step_which_stays_valid(straight, tmp_path):
    out, _, reference = straight
    seen = {}

    def look(step, model):
        seen[step] = evaluate(model, token_data(3, seed=9)), nnx.clone(model)

    result = train(
        tiny_model(**NOISY), DATA, tmp_path, settings(eval_every=2), eval_data=token_data(3, seed=9), on_eval=look
    )
    assert seen.keys() == {0, 2, 4, 6} and seen[0][0] != seen[6][0]
    assert {step: loss for step, (loss, _) in seen.items()} == pytest.approx(dict(result.eval_losses), rel=1e-5)
    early, last = (mlj.to_adapter(seen[step][1]).tensors for step in (2, 6))
    for slot, tensor in moe_lora_interop.read(out).tensors.items():  # and looking changes nothing
        np.testing.assert_array_equal(last[slot], tensor)
        assert np.any(early[slot] != tensor)
    assert reference.eval_losses[6] == result.eval_losses[6]


def test_the_localized_loss_is_left_out_or_refused(tmp_path):
    data, few = token_data(4), settings(steps=1)
    with pytest.raises(TrainingError, match="router_aux_loss_coef: found 0.1 with router_aux_loss 'localized'"):
        train(tiny_model(num_experts=4, router_aux_loss="localized", router_aux_loss_coef=0.1), data, tmp_path, few)
    model, plain = tiny_model(num_experts=4, router_aux_loss="localized"), tiny_model(num_experts=4)
    train(model, data, tmp_path / "localized", few)
    train(plain, data, tmp_path / "none", few)
    for slot, tensor in mlj.to_adapter(plain).tensors.items():
        np.testing.assert_array_equal(mlj.to_adapter(model).tensors[slot], tensor)


def test_evaluate_is_the_mean_over_all_counted_tokens_without_dropout():
    model, data = tiny_model(**NOISY), token_data(5, seed=3)
    nll = []
    for example in data.examples:
        logits = np.asarray(model(jnp.asarray(example.ids[None]))[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        at = np.flatnonzero(example.counted[1:]) + 1
        nll += (-log_p[at - 1, example.ids[at]]).tolist()
    model.train()
    assert evaluate(model, data, batch_size=2) == pytest.approx(np.mean(nll), rel=1e-5)
    assert model.model.layers[0].self_attn.q_proj.dropout.deterministic is False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_three_steps_and_three_after_resuming_equal_six_exactly(straight, tmp_path, monkeypatch, number):
    reference_out, reference, _ = straight
    evaluation = token_data(3, seed=9)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        stop_at(patch, 3, number)
        stopped = train(tiny_model(**NOISY), DATA, tmp_path, settings(), eval_data=evaluation)
    assert (stopped.step, stopped.is_finished) == (3, False)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    if number == signal.SIGINT:  # as runs were left before the adapter was saved with every checkpoint
        for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "training/starts.jsonl"):
            (tmp_path / name).unlink()

    model = tiny_model(**NOISY)
    resumed = train(model, DATA, tmp_path, settings(resume=True), eval_data=evaluation)
    assert resumed.is_finished
    found, expected = arrays(model), arrays(reference)
    assert found.keys() == expected.keys()
    for path, value in expected.items():  # adapter, base and dropout counters
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    assert without_times(metrics(tmp_path)) == without_times(metrics(reference_out))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (reference_out / name).read_bytes()


def test_a_crash_between_checkpoints_resumes_from_the_last_one_exactly(straight, tmp_path, monkeypatch):
    reference_out, reference, _ = straight
    evaluation = token_data(3, seed=9)
    advance = loop_module._Loop.advance

    def advance_or_crash(self, show):
        advance(self, show)
        if self.step == 5:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(loop_module._Loop, "advance", advance_or_crash)
        with pytest.raises(MemoryError):
            train(tiny_model(**NOISY), DATA, tmp_path, settings(checkpoint_every=2), eval_data=evaluation)
    with (tmp_path / "training" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the crash cut a line
    model = tiny_model(**NOISY)
    train(model, DATA, tmp_path, settings(resume=True, checkpoint_every=2), eval_data=evaluation)
    for path, value in arrays(reference).items():
        np.testing.assert_array_equal(arrays(model)[path], value)
    assert without_times(metrics(tmp_path)) == without_times(metrics(reference_out))


def test_a_crash_before_the_first_checkpoint_starts_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop_module._Loop, "advance", lambda self, show: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tiny_model(), DATA, tmp_path, settings())
    assert train(tiny_model(), DATA, tmp_path, settings(resume=True)).is_finished


def test_old_checkpoints_are_removed_and_a_finished_run_can_be_resumed(tmp_path):
    out = tmp_path / "new" / "folder"
    train(tiny_model(), DATA, out, settings(checkpoint_every=1, keep_checkpoints=3))
    folder = out / "training" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["4", "5", "6"]
    before = (out / "adapter_model.safetensors").read_bytes()
    result = train(tiny_model(), DATA, out, settings(resume=True))
    assert result.is_finished and result.losses.keys() == {1, 2, 3, 4, 5, 6}
    assert (out / "adapter_model.safetensors").read_bytes() == before


def same_adapter(found, expected) -> bool:
    return all(np.array_equal(found.tensors[slot], tensor) for slot, tensor in expected.tensors.items())


def test_with_every_checkpoint_the_adapter_of_its_step_is_saved(tmp_path):
    """What is on the disk before each step ends, against what `on_eval` was given after earlier ones."""
    seen, on_disk = {}, {}

    def look(step, model):
        seen[step] = mlj.to_adapter(model)
        if (tmp_path / "adapter_config.json").exists():
            on_disk[step] = moe_lora_interop.read(tmp_path)

    fields = {"checkpoint_every": 2, "eval_every": 1}
    train(tiny_model(**NOISY), DATA, tmp_path, settings(**fields), eval_data=token_data(3, seed=9), on_eval=look)
    assert on_disk.keys() == {3, 4, 5, 6}  # the save of step 2 comes after its evaluation
    for step, adapter in on_disk.items():
        assert same_adapter(adapter, seen[(step - 1) // 2 * 2]) and not same_adapter(adapter, seen[step])
    assert same_adapter(moe_lora_interop.read(tmp_path), seen[6])


def test_the_best_adapter_is_kept_recorded_and_not_lost_by_a_continuation(tmp_path, monkeypatch):
    seen, evaluation = {}, token_data(3, seed=9)
    fields = {"eval_every": 1, "save_best": True, "learning_rate": 0.1, "checkpoint_every": 2, "steps": 8}

    def look(step, model):
        seen[step] = mlj.to_adapter(model)

    result = train(tiny_model(), DATA, tmp_path, settings(**fields), eval_data=evaluation, on_eval=look)
    losses = result.eval_losses
    lowest = min(losses, key=losses.get)
    assert 0 < lowest < 8, "the test needs a minimum inside the run"
    assert result.best == (lowest, losses[lowest])
    assert json.loads((tmp_path / "best" / "best.json").read_text()) == {"step": lowest, "eval_loss": losses[lowest]}
    assert same_adapter(moe_lora_interop.read(tmp_path / "best"), seen[lowest])
    assert same_adapter(moe_lora_interop.read(tmp_path), seen[8])  # the folder does not disturb
    assert evaluate(mlj.load_adapter(tiny_base(), tmp_path / "best"), evaluation) == pytest.approx(losses[lowest])
    before = (tmp_path / "best" / "adapter_model.safetensors").stat().st_mtime_ns
    longer = settings(**{**fields, "steps": 9, "resume": True})
    again = train(tiny_model(), DATA, tmp_path, longer, eval_data=evaluation)
    assert again.eval_losses[9] > losses[lowest] and again.best == result.best
    assert (tmp_path / "best" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_the_best_needs_something_to_choose_by(tmp_path):
    with pytest.raises(TrainingError, match="save_best: found without eval_data"):
        train(tiny_model(), DATA, tmp_path / "out", settings(save_best=True))
    assert not (tmp_path / "out").exists()


def starts(out) -> list[dict]:
    return [json.loads(line) for line in (out / "training" / "starts.jsonl").read_text().splitlines()]


def test_more_steps_extend_a_run_by_the_data_and_the_learning_rate_of_a_longer_one(tmp_path, caplog):
    fields = {"learning_rate": 1e-9}  # then the losses tell which batches were seen, and in which order
    train(tiny_model(), DATA, tmp_path / "out", settings(steps=4, **fields))
    assert not caplog.records
    result = train(tiny_model(), DATA, tmp_path / "out", settings(steps=9, resume=True, **fields))
    straight = train(tiny_model(), DATA, tmp_path / "straight", settings(steps=9, **fields))
    assert result.is_finished and len(set(straight.losses.values())) == 9
    assert list(result.losses.values()) == pytest.approx(list(straight.losses.values()), rel=1e-6)

    def rate(step, total, warmup=2):  # steps count from 1
        i = step - 1
        return 1e-9 * ((i + 1) / warmup if i < warmup else (1 + np.cos(np.pi * (i - warmup) / (total - warmup))) / 2)

    expected = [rate(step, 4 if step <= 4 else 9) for step in range(1, 10)]
    assert [r["learning_rate"] for r in metrics(tmp_path / "out")] == pytest.approx(expected, rel=1e-5)
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.startswith("extended from 4 to 9 steps, after step 4: the learning rate, ")
    assert f"{rate(4, 4):.3g} there" in said and f"a run of 9 steps, {rate(5, 9):.3g}" in said
    assert [(s["step"], s["total_steps"]) for s in starts(tmp_path / "out")] == [(0, 4), (4, 9)]
    # from now on it is a run of 9 steps
    assert train(tiny_model(), DATA, tmp_path / "out", settings(steps=9, resume=True, **fields)).is_finished
    for fewer, problem in (
        ({"steps": 4}, "settings.steps: found 4, the run has 9, expected that or more"),
        ({"steps": None, "epochs": 99}, "settings.steps: found None, the run has 9"),
    ):
        with pytest.raises(TrainingError, match=problem):
            train(tiny_model(), DATA, tmp_path / "out", settings(resume=True, **fields, **fewer))


def test_an_extended_run_that_is_stopped_continues_to_the_bit(tmp_path, monkeypatch):
    for name in ("straight", "stopped"):
        train(tiny_model(**NOISY), DATA, tmp_path / name, settings(steps=2))
    more = settings(steps=6, resume=True)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert not train(tiny_model(**NOISY), DATA, tmp_path / "stopped", more).is_finished
    for name in ("straight", "stopped"):
        assert train(tiny_model(**NOISY), DATA, tmp_path / name, more).is_finished
    one, two = (tmp_path / name / "adapter_model.safetensors" for name in ("straight", "stopped"))
    assert one.read_bytes() == two.read_bytes()
    assert without_times(metrics(tmp_path / "straight")) == without_times(metrics(tmp_path / "stopped"))


def test_more_epochs_extend_too_and_a_short_last_batch_is_said(tmp_path, caplog):
    fields = {"steps": None, "batch_size": 4, "gradient_accumulation": 1}
    train(tiny_model(), DATA, tmp_path, settings(epochs=1, **fields))
    result = train(tiny_model(), DATA, tmp_path, settings(epochs=2, resume=True, **fields))
    assert result.step == 5  # 20 rows in fours
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.endswith("step 3 was 2 examples short, which the next epoch leaves out")  # 10 rows in fours


def test_a_run_is_not_overwritten_and_another_one_not_continued(straight):
    out, _, _ = straight
    with pytest.raises(TrainingError, match=r"already holds a run; resume it \(--resume\), or choose"):
        train(tiny_model(**NOISY), DATA, out, settings(), eval_data=token_data(3, seed=9))
    with pytest.raises(TrainingError) as caught:
        train(tiny_model(r=4), token_data(11), out, settings(resume=True, learning_rate=1.0, batch_size=1))
    message = str(caught.value)
    for expected in (
        "settings.learning_rate: found 1.0, the run has 0.01",
        "settings.batch_size: found 1, the run has 2",
        "adapter.r: found 4, the run has 2",
        "data: found '11 examples",
        "eval_data: found None",
    ):
        assert expected in message
    assert "base:" not in message
    with pytest.raises(TrainingError, match="base: found '"):
        train(tiny_model(seed=5, **NOISY), DATA, out, settings(resume=True), eval_data=token_data(3, seed=9))


def test_nothing_to_resume(tmp_path):
    with pytest.raises(TrainingError, match="no run has started there"):
        train(tiny_model(), DATA, tmp_path, settings(resume=True))


def test_a_damaged_checkpoint_is_named(tmp_path):
    train(tiny_model(), DATA, tmp_path, settings())
    arrays_folder = tmp_path / "training" / "checkpoints" / "6" / "arrays"
    for path in arrays_folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(TrainingError, match="damaged checkpoint") as caught:
        train(tiny_model(), DATA, tmp_path, settings(resume=True))
    assert "checkpoints/6" in str(caught.value)


HOLDER = """
import sys
from moe_lora_jax.train.run_dir import RunDirectory
with RunDirectory(sys.argv[1], {"a": 1}, resume=False):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_share_a_directory_and_a_dead_one_leaves_no_lock(tmp_path, tally):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(TrainingError, match=f"process {holder.pid} is training into it"):
            train(tiny_model(), DATA, tmp_path, settings())
        holder.kill()
    with pytest.raises(TrainingError, match="already holds a run"):  # past the lock
        train(tiny_model(), DATA, tmp_path, settings())
    tally("second runs refused a directory", tried=1, lost=0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, tally):
    model = tiny_model()
    embedding = model.model.embed_tokens.embedding
    embedding[...] = embedding[...].at[7].set(jnp.nan)
    clean = [e for e in token_data(40, seed=3).examples if 7 not in e.ids][:8]
    poisoned = next(e for e in token_data(40, seed=3).examples if 7 in e.ids)
    data = type(DATA)(DATA.file, (*clean, poisoned))
    with pytest.raises(TrainingError) as caught:
        train(model, data, tmp_path, settings(checkpoint_every=1))  # after an error, too, the model can be used
    message, step = str(caught.value), int(str(caught.value).split("step ")[1].split(":")[0])
    assert f"step {step}: the loss is nan" in message
    assert str(poisoned.line) in message.split("batch: lines ")[1].split(" of ")[0].split(", ")
    assert "made_up.jsonl" in message
    last = f"{tmp_path}/training/checkpoints/{step - 1}" if step > 1 else "none"
    assert f"last good checkpoint: {last}" in message
    assert (tmp_path / "adapter_config.json").exists() == (step > 1)  # the adapter of the last good checkpoint
    for value in jax.tree.leaves(mlj.to_adapter(model).tensors):
        assert np.isfinite(value).all()
    tally("runs stopped at a loss that is not finite", tried=1, lost=0)


def test_a_collapse_is_warned_of_once(tmp_path, caplog):
    model = tiny_model(top_k=None, router_bias=True)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, mlj.Router):
            module.bias[...] = jnp.array([20.0, 0.0, 0.0])
    train(model, DATA, tmp_path, settings())
    warnings = [r.getMessage() for r in caplog.records if "collapsed" in r.getMessage()]
    assert len(warnings) == 1
    assert "step 1: routing collapsed in 3 of 3 modules" in warnings[0]
    assert metrics(tmp_path)[0]["router_dead_experts"] == 6


def test_routers_that_cannot_learn_are_warned_of_and_do_not_move(tmp_path):
    with pytest.warns(UserWarning, match="cannot learn"):
        model = tiny_model(top_k=1)
    before = arrays(model, mlj.MoeLoraParam)
    with pytest.warns(UserWarning, match="3 routers .* cannot learn"):  # a loaded adapter says it only here
        train(model, DATA, tmp_path, settings(weight_decay=0.0))
    after = arrays(model, mlj.MoeLoraParam)
    for path, value in before.items():
        assert np.any(after[path] != value) == ("router" not in path), path


@pytest.mark.parametrize("part", ["router", "experts"])
def test_a_part_can_be_trained(tmp_path, part):
    model = tiny_model()
    before = arrays(model, mlj.MoeLoraParam)
    train(model, DATA, tmp_path, settings(train_only=part))
    for path, value in arrays(model, mlj.MoeLoraParam).items():
        assert np.any(before[path] != value) == (("router" in path) == (part == "router")), path


def test_nothing_to_train(tmp_path):
    with pytest.raises(TrainingError, match="the model has no adapter"):
        train(tiny_base(), DATA, tmp_path, settings())
    with pytest.raises(TrainingError, match="train_only = 'router' selects nothing"):
        train(tiny_model(num_experts=1, top_k=None), DATA, tmp_path, settings(train_only="router"))
    by_task = tiny_model(router_input="task", router_depth=0, num_tasks=2)
    with pytest.raises(TrainingError, match="router_input: found 'task', expected 'hidden': the data has no task ids"):
        train(by_task, DATA, tmp_path, settings())
    assert not list(tmp_path.iterdir())


def test_epochs_see_every_example_that_often(tmp_path):
    fields = {"steps": None, "epochs": 2, "batch_size": 4, "gradient_accumulation": 1}
    result = train(tiny_model(), DATA, tmp_path, settings(**fields))
    assert result.step == 5  # 20 rows in fours


def test_plain_lora_trains(tmp_path):
    result = train(tiny_model(num_experts=1, top_k=None), DATA, tmp_path, settings())
    assert result.is_finished
    assert "router_entropy" not in metrics(tmp_path)[0] and metrics(tmp_path)[0]["router"] == {}


def test_loss_falls(tmp_path):
    result = train(tiny_model(), token_data(4), tmp_path, settings(steps=25, log_every=24))
    assert result.losses.keys() == {1, 24, 25}
    assert result.losses[25] < 0.9 * result.losses[1]


def test_progress_is_told_after_every_step_and_not_shown_unasked(tmp_path, capfd):
    told = []
    train(tiny_model(), DATA, tmp_path, settings(), on_progress=lambda *words: told.append(words))
    assert [(done, total) for done, total, _ in told] == [(step, 6) for step in range(1, 7)]
    assert all(text.startswith("training: loss ") and text.endswith(" tokens/s") for _, _, text in told)
    assert capfd.readouterr() == ("", "")


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write the output"):
        train(tiny_model(), DATA, tmp_path / "file", settings())
