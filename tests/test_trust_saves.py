"""Saves over a checkpoint that fail, are killed or lose power at any step leave the old one, the new one or neither."""

import errno
import multiprocessing
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import interop
from interop import Adapter, CheckpointError
from interop.atomic import PREVIOUS
from interop.samples import sample
from tests.adapters import make_adapter
from tests.faulty_disk import ERRORS, Disk, refuses
from tests.trust_workers import save_as_another_user, save_for_ever

CASES = [("native", "native"), ("xlora", "xlora"), ("arrow", "arrow"), ("arrow", "native"), ("xlora", "loramoe")]
cases = pytest.mark.parametrize(("old", "new"), CASES, ids=[f"{old}-{new}" for old, new in CASES])
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk or become another user")


def same(found: Adapter, expected: Adapter) -> bool:
    """The same config, tensors and bits."""
    return found.config == expected.config and {k: v.tobytes() for k, v in found.tensors.items()} == {
        k: v.tobytes() for k, v in expected.tensors.items()
    }


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


class Trial:
    """An old checkpoint in a directory, a new one for it, and what may be found there."""

    def __init__(self, folder: Path, old: str, new: str, seed: int = 0):
        self.root, self.directory = folder / "disk", folder / "disk" / "out"
        self.layout, self.adapters = new, {}
        for name, layout, n in (("old", old, seed), ("new", new, seed + 1), ("next", new, seed + 2)):
            interop.write(sample(layout, seed=n), folder / name, layout)
            self.adapters[name] = interop.read(folder / name)
        self.start, self.files = folder / "old", {name: listing(folder / name) for name in ("old", "new", "next")}
        self.reset()

    def reset(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.start, self.directory)

    def save(self, name: str = "new", directory: Path | None = None) -> None:
        interop.write(self.adapters[name], directory or self.directory, self.layout)

    def found(self, directory: Path) -> str:
        """ "old", "new", "refused" (with the old one complete in PREVIOUS), or what is wrong."""
        try:
            adapter = interop.read(directory)
        except CheckpointError as error:
            if not (directory / PREVIOUS).is_dir():
                return f"lost: {error}"
            kept = same(interop.read(directory / PREVIOUS), self.adapters["old"])
            return "refused" if kept else "lost: the copy is not the old one"
        return next((n for n, known in self.adapters.items() if same(adapter, known)), "lost: a mixture")

    def next_save_is_clean(self, directory: Path) -> bool:
        """Whether it succeeds and leaves nothing but its own files (the old model card among them)."""
        self.save("next", directory)
        files = set(self.files["next"]) | {"README.md"} & set(self.files["old"])
        return same(interop.read(directory), self.adapters["next"]) and set(listing(directory)) == files


@pytest.fixture(autouse=True)
def readers_wait_no_longer(monkeypatch):
    monkeypatch.setattr("interop.checkpoint.RETRIES", 1)


def steps_of(trial: Trial) -> int:
    with Disk(trial.root).watched() as disk:
        trial.save()
    trial.reset()
    assert disk.steps > 30
    return disk.steps


def chosen(steps: int, tries) -> list[int]:
    """Every step, or some: the first, the last and a few between, more of them towards the end, where files move."""
    some = {round(steps * (n / 7) ** 0.5) for n in range(1, 8)} | {1}
    return sorted(some) if tries(1, 0) else list(range(1, steps + 1))


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
        interop.write(adapter, tmp_path / f"{layout}_whole", layout)
        expected, files = interop.read(tmp_path / f"{layout}_whole"), listing(tmp_path / f"{layout}_whole")
        stride = tries(9, 1)

        def before(step, what, path, layout=layout, stride=stride):
            if step % stride == 0:
                disk.after_kill(tmp_path / f"{layout}_killed{step}")  # noqa: B023
                disk.after_power_cut(tmp_path / f"{layout}_cut{step}", 0.5, step)  # noqa: B023

        disk = Disk(root, before)
        with disk.watched():
            interop.write(adapter, root / "new" / "out", layout)
        disk.after_power_cut(tmp_path / f"{layout}_cut_after", 0.0, 0)
        assert same(interop.read(tmp_path / f"{layout}_cut_after" / "new" / "out"), expected)
        for left in [*tmp_path.glob(f"{layout}_killed*"), *tmp_path.glob(f"{layout}_cut[0-9]*")]:
            tried += 1
            try:
                whole = same(interop.read(left / "new" / "out"), expected)
            except CheckpointError:
                whole = True
            interop.write(adapter, left / "new" / "out", layout)
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
            adapter = interop.read(trial.directory)
            states.append(next((k for k, known in trial.adapters.items() if same(adapter, known)), "mixture"))
            good = states[-1] != "mixture"
        except CheckpointError as error:
            kept = interop.read(trial.directory / PREVIOUS)  # which of the two was the old one is not known here
            states.append("refused")
            good = "interrupted" in str(error) and any(same(kept, known) for known in trial.adapters.values())
        if not good or not trial.next_save_is_clean(trial.directory):
            lost.append((n, states[-1], listing(trial.directory)))
    assert not lost, lost[:3]
    assert len(set(states)) > 1  # the kills hit different moments
    tally("saves killed by kill -9", tried=len(states), lost=len(lost))


# --- disks and permissions as they are --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB of its own."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(path: Path, leave: int) -> None:
    free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
    path.write_bytes(b"x" * max(0, free - leave))


@needs_root
@pytest.mark.parametrize("layout", ["native", "xlora", "loramoe", "arrow"])
def test_a_disk_that_is_full(tmp_path, tally, small_disk, layout):
    """From no page left to enough of them."""
    trial = Trial(tmp_path, layout, layout)
    directory, tried, lost, succeeded = small_disk / "out", 0, [], False
    while not succeeded and tried < 60:
        shutil.copytree(trial.start, directory)
        fill(small_disk / "filler", 4096 * tried)
        tried += 1
        try:
            trial.save("new", directory)
            succeeded = True
        except CheckpointError as error:
            if "No space left" not in str(error) or listing(directory) != trial.files["old"]:
                lost.append((tried, str(error), listing(directory)))
            if trial.found(directory) != "old":
                lost.append((tried, trial.found(directory)))
        (small_disk / "filler").unlink()
        if not trial.next_save_is_clean(directory):
            lost.append((tried, listing(directory)))
        shutil.rmtree(directory)
    assert not lost, lost[:3]
    assert succeeded and tried > 3
    tally("saves on a full disk", tried=tried, lost=len(lost))


@needs_root
def test_a_read_only_disk(tmp_path, small_disk):
    trial = Trial(tmp_path, "native", "native")
    shutil.copytree(trial.start, small_disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="could not save.*\n.*Read-only file system"):
        trial.save("new", small_disk / "out")
    with pytest.raises(CheckpointError, match="could not save.*\n.*Read-only file system"):
        trial.save("new", small_disk / "another" / "one")
    assert trial.found(small_disk / "out") == "old"
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert listing(small_disk / "out") == trial.files["old"] and listing(small_disk)[0] == "out"
    assert trial.next_save_is_clean(small_disk / "out")


@needs_root
def test_a_directory_of_another_user(tmp_path, processes):
    """As a user who may read it, and not write."""
    trial = Trial(tmp_path, "native", "native")
    for folder in [*tmp_path.parents, tmp_path]:
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    with processes.Pool(1, maxtasksperchild=1) as pool:
        for directory in (trial.directory, tmp_path / "fresh" / "one"):
            said = pool.apply(save_as_another_user, (trial.adapters["new"], directory))
            assert "could not save" in said and "Permission denied" in said and str(directory) in said
    assert trial.found(trial.directory) == "old" and listing(trial.directory) == trial.files["old"]
    assert not (tmp_path / "fresh").exists()


def test_files_in_the_place_of_folders(tmp_path):
    trial = Trial(tmp_path, "xlora", "xlora")
    (tmp_path / "file").write_text("mine")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="could not save.*\n.*(File exists|Not a directory)"):
            trial.save("new", directory)
    assert (tmp_path / "file").read_text() == "mine"
    shutil.rmtree(trial.directory / "expert_2")
    (trial.directory / "expert_2").write_text("mine")
    before = listing(trial.directory)
    with pytest.raises(CheckpointError, match="could not save.*\n.*expert_2"):
        trial.save()
    assert listing(trial.directory) == before and (trial.directory / "expert_2").read_text() == "mine"


def test_links_in_the_place_of_directories_and_files(tmp_path):
    """A link to a directory is followed; files that are links, as in a cache of the Hugging Face hub, are replaced."""
    trial = Trial(tmp_path, "native", "native")
    (tmp_path / "link").symlink_to(trial.directory)
    trial.save("new", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and trial.found(trial.directory) == "new"
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="could not save.*\n.*File exists"):
        trial.save("new", tmp_path / "nowhere")

    trial.reset()
    blobs = trial.directory / "blobs"
    blobs.mkdir()
    for name in trial.files["old"]:
        (trial.directory / name).rename(blobs / name)
        (trial.directory / name).symlink_to(Path("blobs") / name)
    with Disk(trial.root, lambda n, what, path: disk.after_kill(tmp_path / f"k{n}")).watched() as disk:
        trial.save()
    states = [trial.found(tmp_path / f"k{n}" / "out") for n in range(1, disk.steps + 1)]
    assert set(states) <= {"old", "new", "refused"} and states[0] == "old" and states[-1] == "new"
    for name in trial.files["old"]:
        assert (blobs / name).read_bytes() == (trial.start / name).read_bytes()


def test_disk_errors_other_than_full_are_named(tmp_path):
    trial = Trial(tmp_path, "native", "native")
    with Disk(trial.root, refuses(errno.EDQUOT, 5)).watched(), pytest.raises(CheckpointError, match="quota exceeded"):
        trial.save()


# --- what is replaced -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", ["native", "loramoe", "xlora", "lora"])
@pytest.mark.parametrize("old", ["arrow", "xlora"])
def test_nothing_of_an_old_layout_with_folders_remains(tmp_path, old, new):
    interop.write(sample(old), tmp_path / "out", old)
    interop.write(sample(new, seed=1), tmp_path / "out", new)
    interop.write(sample(new, seed=1), tmp_path / "fresh", new)
    assert listing(tmp_path / "out") == listing(tmp_path / "fresh")
    assert interop.detect(tmp_path / "out") == interop.detect(tmp_path / "fresh") == new


def test_experts_that_are_no_part_of_the_layout_as_written_here_are_kept(tmp_path):
    """An arrow config may name folders of the user's own; only its config is replaced."""
    interop.write(sample("arrow"), tmp_path, "arrow")
    config = tmp_path / "arrow_router" / "adapter_config.json"
    (tmp_path / "task_0").rename(tmp_path / "my_lora")
    config.write_text(config.read_text().replace('"task_0"', '"my_lora"'))
    interop.write(make_adapter(), tmp_path)
    left = {name for name in listing(tmp_path) if name.endswith("adapter_model.safetensors")}
    assert left == {"adapter_model.safetensors", "my_lora/adapter_model.safetensors"}
    assert interop.detect(tmp_path) == "native"


def test_two_writers_at_once_leave_one_of_theirs(tmp_path, tries, processes):
    trial = Trial(tmp_path, "xlora", "xlora")
    writers = [
        processes.Process(target=save_for_ever, args=(trial.adapters, trial.directory, "xlora", tries(6, 60)))
        for _ in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [w.exitcode for w in writers] == [0, 0, 0]
    (trial.directory / "saves_go_on").unlink()
    assert trial.found(trial.directory) in trial.adapters
    assert listing(trial.directory) == trial.files["new"]


# --- PEFT's own save --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft_models():
    """Two with adapters of the same shapes, and other values and another lora_alpha."""
    import peft
    from test_peft_support import config, tiny_llama

    return [peft.get_peft_model(tiny_llama(seed=n), config(lora_alpha=4 + n)) for n in range(2)]


def test_what_pefts_save_promises_when_cut_off(tmp_path, tries, tally, peft_models):
    """It writes in place, the card, the tensors, the config: as interop/FORMAT.md says.

    A cut file is refused. Between the two files the new tensors stand beside the old config, and nothing tells: PEFT
    writes no digest.
    """
    known, files = {}, {}
    for name, model in zip(("old", "new"), peft_models, strict=True):
        model.save_pretrained(tmp_path / name)
        known[name] = interop.read(tmp_path / name)
        files[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    between = Adapter(known["old"].config, known["new"].tensors)

    def found(directory: Path) -> str:
        try:
            adapter = interop.read(directory)
        except CheckpointError:
            return "refused"
        states = {**known, "between": between}
        return next((name for name, state in states.items() if same(adapter, state)), "lost")

    shutil.copytree(tmp_path / "old", tmp_path / "out")
    with Disk(tmp_path / "out", lambda n, *_: disk.after_kill(tmp_path / f"killed{n}")).watched() as disk:
        peft_models[1].save_pretrained(tmp_path / "out")
    states = [found(tmp_path / f"killed{n}") for n in range(1, disk.steps + 1)] + [found(tmp_path / "out")]
    assert states == sorted(states, key=["old", "between", "refused", "new"].index) and set(states) >= {"old", "new"}

    weights = tmp_path / "old" / "adapter_model.safetensors"
    new = files["new"][weights.name]
    for size in range(0, len(new), tries(200, 10)):  # a file that ends anywhere
        weights.write_bytes(new[:size])
        states.append(found(weights.parent))
        assert states[-1] == "refused", size
    noticed = [state for state in states if state != "between"]
    tally("PEFT's own saves killed, but for between its files", tried=len(noticed), lost=noticed.count("lost"))


def test_a_peft_adapter_saved_elsewhere_and_converted_replaces_the_old_one_whole(tmp_path, tries, tally, peft_models):
    """The way to have what PEFT's own save does not promise."""
    for name, model in zip(("old", "new"), peft_models, strict=True):
        model.save_pretrained(tmp_path / name)
    known = {name: interop.read(tmp_path / name) for name in ("old", "new")}
    interop.convert(tmp_path / "old", tmp_path / "out")
    with Disk(tmp_path / "out", lambda n, *_: disk.after_kill(tmp_path / f"killed{n}")).watched() as disk:
        interop.convert(tmp_path / "new", tmp_path / "out")
    lost = []
    for n in range(1, disk.steps + 1):
        place = tmp_path / f"killed{n}"
        try:
            good = any(same(interop.read(place), adapter) for adapter in known.values())
        except CheckpointError:
            good = same(interop.read(place / PREVIOUS), known["old"])
        lost += [] if good else [n]
    assert not lost, lost
    tally("converted PEFT adapters killed", tried=disk.steps, lost=len(lost))
