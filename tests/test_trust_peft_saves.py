"""What PEFT's own save promises when it is killed, and the way to a save that is whole."""

import shutil
from pathlib import Path

import pytest

import moe_lora_interop
from moe_lora_interop import Adapter, CheckpointError
from moe_lora_interop.disk.atomic import PREVIOUS
from tests.faulty_disk import Disk
from tests.save_trials import same


@pytest.fixture(scope="module")
def peft_models():
    """Two with adapters of the same shapes, and other values and another lora_alpha."""
    import peft
    from test_peft_support import config, tiny_llama

    return [peft.get_peft_model(tiny_llama(seed=n), config(lora_alpha=4 + n)) for n in range(2)]


def test_what_pefts_save_promises_when_cut_off(tmp_path, tries, tally, peft_models):
    """It writes in place, the card, the tensors, the config: as interop/moe_lora_interop/FORMAT.md says.

    A cut file is refused. Between the two files the new tensors stand beside the old config, and nothing tells: PEFT
    writes no digest.
    """
    known, files = {}, {}
    for name, model in zip(("old", "new"), peft_models, strict=True):
        model.save_pretrained(tmp_path / name)
        known[name] = moe_lora_interop.read(tmp_path / name)
        files[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    between = Adapter(known["old"].config, known["new"].tensors)

    def found(directory: Path) -> str:
        try:
            adapter = moe_lora_interop.read(directory)
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
    known = {name: moe_lora_interop.read(tmp_path / name) for name in ("old", "new")}
    moe_lora_interop.convert(tmp_path / "old", tmp_path / "out")
    with Disk(tmp_path / "out", lambda n, *_: disk.after_kill(tmp_path / f"killed{n}")).watched() as disk:
        moe_lora_interop.convert(tmp_path / "new", tmp_path / "out")
    lost = []
    for n in range(1, disk.steps + 1):
        place = tmp_path / f"killed{n}"
        try:
            good = any(same(moe_lora_interop.read(place), adapter) for adapter in known.values())
        except CheckpointError:
            good = same(moe_lora_interop.read(place / PREVIOUS), known["old"])
        lost += [] if good else [n]
    assert not lost, lost
    tally("converted PEFT adapters killed", tried=disk.steps, lost=len(lost))
