"""A save over an old checkpoint, and what may be found after it. No test of its own."""

import shutil
from pathlib import Path

import moe_lora_interop
from moe_lora_interop import Adapter, CheckpointError
from moe_lora_interop.disk.atomic import PREVIOUS
from tests.faulty_disk import Disk
from tools.samples import sample


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
            moe_lora_interop.write(sample(layout, seed=n), folder / name, layout)
            self.adapters[name] = moe_lora_interop.read(folder / name)
        self.start, self.files = folder / "old", {name: listing(folder / name) for name in ("old", "new", "next")}
        self.reset()

    def reset(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.start, self.directory)

    def save(self, name: str = "new", directory: Path | None = None) -> None:
        moe_lora_interop.write(self.adapters[name], directory or self.directory, self.layout)

    def found(self, directory: Path) -> str:
        """ "old", "new", "refused" (with the old one complete in PREVIOUS), or what is wrong."""
        try:
            adapter = moe_lora_interop.read(directory)
        except CheckpointError as error:
            if not (directory / PREVIOUS).is_dir():
                return f"lost: {error}"
            kept = same(moe_lora_interop.read(directory / PREVIOUS), self.adapters["old"])
            return "refused" if kept else "lost: the copy is not the old one"
        return next((n for n, known in self.adapters.items() if same(adapter, known)), "lost: a mixture")

    def next_save_is_clean(self, directory: Path) -> bool:
        """Whether it succeeds and leaves nothing but its own files (the old model card among them)."""
        self.save("next", directory)
        files = set(self.files["next"]) | {"README.md"} & set(self.files["old"])
        return same(moe_lora_interop.read(directory), self.adapters["next"]) and set(listing(directory)) == files


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
