"""Saves over a checkpoint that fail, are killed or lose power at any step leave the old one, the new one or neither."""

import multiprocessing
import os
import random
import time

import pytest

import moe_lora_interop
from moe_lora_interop import CheckpointError
from moe_lora_interop.disk.atomic import PREVIOUS
from tests.faulty_disk import ERRORS, Disk, refuses
from tests.save_trials import Trial, chosen, listing, same, steps_of
from tests.trust_workers import save_for_ever
from tools.samples import sample

CASES = [("native", "native"), ("xlora", "xlora"), ("arrow", "arrow"), ("arrow", "native"), ("xlora", "loramoe")]
cases = pytest.mark.parametrize(("old", "new"), CASES, ids=[f"{old}-{new}" for old, new in CASES])


@pytest.fixture(autouse=True)
def readers_wait_no_longer(monkeypatch):
    monkeypatch.setattr("moe_lora_interop.checkpoint.read_write.RETRIES", 1)


# --- at every step ----------------------------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for_good"])
def test_a_disk_that_refuses_at_any_step(tmp_path, tries, tally, old, new, for_good):
    trial, lost = Trial(tmp_path, old, new), []
    count = steps_of(trial)
    steps = [(at, ERRORS[at % 3]) for at in chosen(count, tries)]
    if len(steps) == count:
        steps = [(at, code) for at, _ in steps for code in ERRORS]
    for at, code in steps:
        error = None
        with Disk(trial.root, refuses(code, at, for_good=for_good)).watched():
            try:
                trial.save()
            except CheckpointError as raised:
                error = raised
        found = trial.found(trial.directory)
        clean = for_good or listing(trial.directory) == trial.files["old"]
        if error is None:
            good = found == "new"
        elif "the next save puts it back" in str(error):
            good = for_good and (trial.directory / PREVIOUS).is_dir() and found in ("old", "new", "refused")
        else:
            good = found == "old" and clean and os.strerror(code) in str(error)
        if not good or not trial.next_save_is_clean(trial.directory):
            lost.append((at, code, found, str(error), listing(trial.directory)))
        trial.reset()
    assert not lost, lost[:3]
    tally("saves on a disk that refuses a step", tried=len(steps), lost=len(lost))


@cases
def test_a_kill_at_any_step(tmp_path, tries, tally, old, new):
    trial, found = Trial(tmp_path, old, new), []
    steps = chosen(steps_of(trial), tries)

    def before(step, what, path):
        if step in steps:
            disk.after_kill(tmp_path / f"killed{step}")

    disk = Disk(trial.root, before)
    with disk.watched():
        trial.save()
    for step in steps:
        left = tmp_path / f"killed{step}" / "out"
        state = trial.found(left)
        found.append(state if trial.next_save_is_clean(left) else f"lost: the save after {state} at step {step}")
    assert found[0] == "old" and found[-1] == "new"
    lost = [state for state in found if state.startswith("lost")]
    assert not lost, lost[:3]
    tally("saves killed at a step", tried=len(found), lost=len(lost))


@cases
def test_a_power_cut_at_any_step(tmp_path, tries, tally, old, new):
    """Data that were not synced are lost, and names that were not synced all, none, or some."""
    trial, found = Trial(tmp_path, old, new), []
    steps = chosen(steps_of(trial), tries)
    kinds = [(0.0, 0), (1.0, 0), *((0.5, seed) for seed in range(tries(1, 6)))]

    def before(step, what, path):
        if step in steps:
            for kind in kinds:
                disk.after_power_cut(tmp_path / f"cut{step}{kind}", *kind)

    disk = Disk(trial.root, before)
    with disk.watched():
        trial.save()
    after = {kind: tmp_path / f"after{kind}" for kind in kinds}
    for kind, place in after.items():  # what a save that has returned has written, stays
        disk.after_power_cut(place, *kind)
    cuts = [tmp_path / f"cut{s}{kind}" for s in steps for kind in kinds]
    for place in [*cuts, *after.values()]:
        state = trial.found(place / "out")
        if place in after.values() and state != "new":
            state = f"lost: {state} after the end"
        found.append(state if trial.next_save_is_clean(place / "out") else f"lost: the save after {place}")
    lost = [state for state in found if state.startswith("lost")]
    assert not lost, lost[:3]
    tally("saves cut off from power", tried=len(found), lost=len(lost))


def test_a_first_save_killed_or_cut_off_is_whole_or_no_checkpoint(tmp_path, tries, tally):
    tried, lost = 0, []
    for layout in ("native", "xlora"):
        adapter, root = sample(layout, seed=1), tmp_path / layout
        root.mkdir()
        moe_lora_interop.write(adapter, tmp_path / f"{layout}_whole", layout)
        expected, files = moe_lora_interop.read(tmp_path / f"{layout}_whole"), listing(tmp_path / f"{layout}_whole")
        stride = tries(9, 1)

        def before(step, what, path, layout=layout, stride=stride):
            if step % stride == 0:
                disk.after_kill(tmp_path / f"{layout}_killed{step}")  # noqa: B023
                disk.after_power_cut(tmp_path / f"{layout}_cut{step}", 0.5, step)  # noqa: B023

        disk = Disk(root, before)
        with disk.watched():
            moe_lora_interop.write(adapter, root / "new" / "out", layout)
        disk.after_power_cut(tmp_path / f"{layout}_cut_after", 0.0, 0)
        assert same(moe_lora_interop.read(tmp_path / f"{layout}_cut_after" / "new" / "out"), expected)
        for left in [*tmp_path.glob(f"{layout}_killed*"), *tmp_path.glob(f"{layout}_cut[0-9]*")]:
            tried += 1
            try:
                whole = same(moe_lora_interop.read(left / "new" / "out"), expected)
            except CheckpointError:
                whole = True
            moe_lora_interop.write(adapter, left / "new" / "out", layout)
            if not whole or listing(left / "new" / "out") != files:
                lost.append(left.name)
    assert not lost, lost
    tally("first saves killed or cut off from power", tried=tried, lost=len(lost))


# --- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Children fork from a process without jax and torch, which is ready."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trust_workers"])
    return context


@pytest.mark.parametrize("layout", ["native", "xlora"])
def test_kill_9_at_a_random_time(tmp_path, tries, tally, processes, layout):
    trial = Trial(tmp_path, layout, layout)
    chance, states, lost = random.Random(0), [], []
    began = time.perf_counter()
    trial.save()
    took = time.perf_counter() - began
    for n in range(tries(10, 100)):
        saving = processes.Process(target=save_for_ever, args=(trial.adapters, trial.directory, layout))
        saving.start()
        while not (trial.directory / "saves_go_on").exists():
            assert saving.is_alive()
            os.sched_yield()
        time.sleep(chance.random() * 3 * took)
        saving.kill()
        saving.join()
        (trial.directory / "saves_go_on").unlink()
        try:
            adapter = moe_lora_interop.read(trial.directory)
            states.append(next((k for k, known in trial.adapters.items() if same(adapter, known)), "mixture"))
            good = states[-1] != "mixture"
        except CheckpointError as error:
            kept = moe_lora_interop.read(
                trial.directory / PREVIOUS
            )  # which of the two was the old one is not known here
            states.append("refused")
            good = "interrupted" in str(error) and any(same(kept, known) for known in trial.adapters.values())
        if not good or not trial.next_save_is_clean(trial.directory):
            lost.append((n, states[-1], listing(trial.directory)))
    assert not lost, lost[:3]
    assert len(set(states)) > 1  # the kills hit different moments
    tally("saves killed by kill -9", tried=len(states), lost=len(lost))
