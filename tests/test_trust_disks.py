"""Saves on disks that are full or read-only, into what is no directory, and over other layouts."""

import errno
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

import moe_lora_interop
from moe_lora_interop import CheckpointError
from tests.adapters import make_adapter
from tests.faulty_disk import Disk, refuses
from tests.save_trials import Trial, listing
from tests.trust_workers import save_as_another_user, save_for_ever
from tools.samples import sample

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk or become another user")


@pytest.fixture(autouse=True)
def readers_wait_no_longer(monkeypatch):
    monkeypatch.setattr("moe_lora_interop.checkpoint.read_write.RETRIES", 1)


@pytest.fixture(scope="module")
def processes():
    """Children fork from a process without jax and torch, which is ready."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trust_workers"])
    return context


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
        if Path(tempfile.gettempdir()) in folder.parents:
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
    moe_lora_interop.write(sample(old), tmp_path / "out", old)
    moe_lora_interop.write(sample(new, seed=1), tmp_path / "out", new)
    moe_lora_interop.write(sample(new, seed=1), tmp_path / "fresh", new)
    assert listing(tmp_path / "out") == listing(tmp_path / "fresh")
    assert moe_lora_interop.detect(tmp_path / "out") == moe_lora_interop.detect(tmp_path / "fresh") == new


def test_experts_that_are_no_part_of_the_layout_as_written_here_are_kept(tmp_path):
    """An arrow config may name folders of the user's own; only its config is replaced."""
    moe_lora_interop.write(sample("arrow"), tmp_path, "arrow")
    config = tmp_path / "arrow_router" / "adapter_config.json"
    (tmp_path / "task_0").rename(tmp_path / "my_lora")
    config.write_text(config.read_text().replace('"task_0"', '"my_lora"'))
    moe_lora_interop.write(make_adapter(), tmp_path)
    left = {name for name in listing(tmp_path) if name.endswith("adapter_model.safetensors")}
    assert left == {"adapter_model.safetensors", "my_lora/adapter_model.safetensors"}
    assert moe_lora_interop.detect(tmp_path) == "native"


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
