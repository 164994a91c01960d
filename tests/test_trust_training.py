"""Training that is killed, or whose files are damaged: a continuation gives the very bits of the uninterrupted run."""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import compiled_once, tiny_model, token_data  # noqa: F401

from moe_lora_jax.train import loop as loop_module
from moe_lora_jax.train.checkpoints import Checkpoints, Snapshot
from moe_lora_jax.train.errors import TrainingError
from moe_lora_jax.train.loop import train
from moe_lora_jax.train.run_dir import RunDirectory
from moe_lora_jax.train.settings import TrainSettings
from tests.faulty_disk import Disk

pytestmark = [
    pytest.mark.usefixtures("compiled_once"),
    # of several reads of orbax that fail together, all but the first are reported as the garbage is collected
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
DATA = token_data(10)
NOISY = {"lora_dropout": 0.2, "expert_dropout": 0.1, "router_aux_loss_coef": 0.01}


def settings(**fields) -> TrainSettings:
    return TrainSettings(**{"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "log_every": 1, **fields})


def values(snapshot: Snapshot) -> list[np.ndarray]:
    leaves = jax.tree.leaves((snapshot.state, snapshot.adapter))
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    return [np.array(jax.random.key_data(x) if k else x) for x, k in zip(leaves, is_key, strict=True)]


def same(found: Snapshot, expected: tuple) -> bool:
    position, arrays = expected
    return found.position == position and [a.tobytes() for a in values(found)] == [a.tobytes() for a in arrays]


@pytest.fixture(autouse=True)
def garbage_is_collected_here():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def run(tmp_path_factory, compiled_once):  # noqa: F811
    """4 steps with checkpoints after 2 and 4: (the directory, {step: what was saved}, a snapshot for its structure)."""
    out, saved, likes = tmp_path_factory.mktemp("run"), {}, []
    save = loop_module._Loop.save

    def noting(self):
        save(self)
        snapshot = self._snapshot()
        saved[snapshot.step] = snapshot.position, values(snapshot)
        likes.append(snapshot)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module._Loop, "save", noting)
        train(tiny_model(**NOISY), DATA, out, settings(checkpoint_every=2))
    return out, saved, likes[-1]


def restored(folder: Path, like: Snapshot) -> Snapshot:
    checkpoints = Checkpoints(folder, keep=2)
    try:
        return checkpoints.restore(like)
    finally:
        checkpoints.close()


# --- damage -----------------------------------------------------------------------------------------------------------


def test_every_file_of_the_last_checkpoint_missing_cut_or_flipped(run, tmp_path, tries, tally, caplog):
    """What is restored is the last checkpoint, to the bit, or the one before, with a warning."""
    out, saved, like = run
    chance, tried, lost, steps = random.Random(0), 0, [], set()
    last = out / "training" / "checkpoints" / "4"
    paths = [path for path in sorted(last.rglob("*")) if path.is_file()]
    assert len(paths) > 10
    for path in paths:
        raw = path.read_bytes()
        bits = [chance.randrange(8 * len(raw)) for _ in range(tries(2, 40))] if raw else []
        for damage in [None, 0, len(raw) // 2, *(("bit", bit) for bit in bits)]:
            folder = tmp_path / "training"
            shutil.copytree(out / "training", folder)
            victim = folder / "checkpoints" / "4" / path.relative_to(last)
            if damage is None:
                victim.unlink()
            elif isinstance(damage, int):
                victim.write_bytes(raw[:damage])
            else:
                flipped = bytearray(raw)
                flipped[damage[1] // 8] ^= 1 << damage[1] % 8
                victim.write_bytes(flipped)
            caplog.clear()
            tried += 1
            found = restored(folder / "checkpoints", like)
            steps.add(found.step)
            warned = any("resuming from step 2" in r.getMessage() for r in caplog.records)
            if not same(found, saved[found.step]) or warned != (found.step == 2):
                lost.append((str(victim), damage, found.step))
            shutil.rmtree(folder)
    assert not lost, lost[:5]
    assert steps == {2, 4}  # some damage does no harm: orbax keeps things twice
    tally("checkpoints of a run damaged", tried=tried, lost=len(lost))


def hurt(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_ends_the_same(run, tmp_path, caplog):
    out, _, _ = run
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    hurt(tmp_path / "out" / "training" / "checkpoints" / "4")
    train(tiny_model(**NOISY), DATA, tmp_path / "out", settings(checkpoint_every=2, resume=True))
    (warning,) = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    (aside,) = (tmp_path / "out" / "training").glob("damaged-4-*")
    assert "resuming from step 2" in warning and str(aside) in warning
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()
    assert curve(tmp_path / "out") == curve(out)
    assert sorted(p.name for p in (tmp_path / "out" / "training" / "checkpoints").iterdir()) == ["2", "4"]


def test_if_all_checkpoints_are_damaged_all_are_named_and_none_is_touched(run, tmp_path):
    out, _, like = run
    shutil.copytree(out / "training", tmp_path / "training")
    for step in ("2", "4"):
        hurt(tmp_path / "training" / "checkpoints" / step)
    before = sorted((tmp_path / "training").rglob("*"))
    with pytest.raises(TrainingError, match="damaged checkpoint") as caught:
        restored(tmp_path / "training" / "checkpoints", like)
    assert [f"checkpoints/{step}: " in p for step, p in zip((4, 2), caught.value.problems, strict=True)] == [True] * 2
    assert sorted((tmp_path / "training").rglob("*")) == before


# --- kill -------------------------------------------------------------------------------------------------------------


def test_a_kill_at_any_step_of_a_checkpoints_save(run, tmp_path, tries, tally):
    """A copy of the folder at every step is what a kill would leave."""
    out, saved, like = run
    folder = tmp_path / "disk" / "checkpoints"
    shutil.copytree(out / "training" / "checkpoints" / "2", folder / "2")
    stride, places = tries(4, 1), []

    def before(step, what, path):
        if step % stride == 0:
            places.append(tmp_path / f"killed{step}")
            subprocess.run(["cp", "-a", folder, places[-1]], capture_output=True)  # files may vanish meanwhile

    checkpoints = Checkpoints(folder, keep=1)
    with Disk(folder, before).watched() as disk:
        checkpoints.save(like._replace(step=4))
    checkpoints.close()
    assert disk.steps > 10
    steps = []
    for place in [*places, folder]:
        found = restored(place, like)
        steps.append(found.step if same(found, saved[found.step]) else f"lost: {place}")
    lost = [step for step in steps if step not in (2, 4)]
    assert not lost, lost
    assert steps[0] == 2 and steps[-1] == 4
    tally("checkpoints of a run killed while saving", tried=len(steps), lost=len(lost))


def test_a_kill_while_the_metrics_are_rewritten_loses_none(tmp_path, tally):
    out, identity, lost = tmp_path / "out", {"a": 1}, 0
    with RunDirectory(out, identity, resume=False) as fresh:
        fresh.open_metrics(0)
        for step in range(1, 9):
            fresh.log({"step": step, "lm_loss": 1 / step})
    with Disk(out, lambda n, *_: disk.after_kill(tmp_path / f"killed{n}")).watched() as disk:
        with RunDirectory(out, identity, resume=True) as resumed:
            resumed.open_metrics(6)
    for n in range(1, disk.steps + 1):
        with RunDirectory(tmp_path / f"killed{n}", identity, resume=True) as again:
            lost += [record["step"] for record in again.open_metrics(6)] != [1, 2, 3, 4, 5, 6]
    tally("metrics rewritten under kill", tried=disk.steps, lost=lost)


def test_a_kill_while_a_run_begins_leaves_no_half_of_its_description(tmp_path, tally):
    out, lost = tmp_path / "out", 0
    out.mkdir()
    with Disk(out, lambda n, *_: disk.after_kill(tmp_path / f"killed{n}")).watched() as disk:
        with RunDirectory(out, {"a": 1}, resume=False):
            pass
    for n in range(1, disk.steps + 1):
        started = (tmp_path / f"killed{n}" / "training" / "run.json").exists()
        with RunDirectory(tmp_path / f"killed{n}", {"a": 1}, resume=started):
            lost += json.loads((tmp_path / f"killed{n}" / "training" / "run.json").read_text()) != {"a": 1}
    tally("runs killed as they begin", tried=disk.steps, lost=lost)


RUN = """
import sys
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_disable_most_optimizations", True)
from tests.test_trust_training import DATA, NOISY, settings, tiny_model, train
steps, resume = int(sys.argv[3]), sys.argv[4] == "resume"
train(tiny_model(**NOISY), DATA, sys.argv[2], settings(steps=steps, checkpoint_every=3, resume=resume))
"""


def start(cache: Path, out: Path, steps: int, *, resume: bool) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(cache), str(out), str(steps), "resume" if resume else "start"]
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def curve(out: Path) -> list[dict]:
    """The metrics without the speed."""
    lines = (out / "training" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def test_kill_9_at_random_points_of_a_run_changes_no_bit(tmp_path, tries, tally):
    """One run killed again and again, and at last let finish, against one that never was."""
    chance, kills, cache, out = random.Random(0), 0, tmp_path / "programs", tmp_path / "killed"
    steps = tries(150, 700)
    straight = start(cache, tmp_path / "straight", steps, resume=False)
    assert straight.wait() == 0, straight.stdout.read()
    straight.stdout.close()
    metrics, points = out / "training" / "metrics.jsonl", []
    while kills < tries(3, 15):
        process = start(cache, out, steps, resume=(out / "training" / "run.json").exists())
        began = metrics.stat().st_ino if metrics.exists() else None
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_ino == began):
            time.sleep(0.01)
        first = metrics.read_text().count("\n")
        while process.poll() is None and metrics.read_text().count("\n") < first + 3:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"
        kills += 1
        points.append(metrics.read_text().count("\n"))
    assert points == sorted(points) and points[-1] > points[0]  # it got further each time
    last = start(cache, out, steps, resume=True)
    printed, _ = last.communicate()
    assert last.returncode == 0, printed
    equal = curve(out) == curve(tmp_path / "straight") and all(
        (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
        for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    tally("training killed by kill -9", tried=kills, lost=0 if equal else kills)
