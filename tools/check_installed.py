"""Whether an installed wheel is whole, run where the checkout cannot be imported (`make package`):

python check_installed.py EXTRA GOLDENS, with EXTRA one of "", jax, torch, all, and GOLDENS the directory tests/golden.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np

import moe_lora_interop

FRAMEWORKS = {"jax", "flax", "torch", "transformers", "peft"}
CALLS = {"train --help": "train", "measure --help": "train", "plan --help": "plan", "run -- -m this": "torch"}
"""Calls of the program, and the extra that each needs."""


def main(extra: str, goldens: Path) -> None:
    loaded = FRAMEWORKS & sys.modules.keys()
    assert not loaded, f"moe_lora_interop imports {loaded}"
    assert moe_lora_interop.__version__ == importlib.metadata.version("moe-lora-jax")
    assert Path(moe_lora_interop.__file__).is_relative_to(sys.prefix), f"not the wheel: {moe_lora_interop.__file__}"
    for package, data in (
        ("moe_lora_interop", "py.typed"),
        ("moe_lora_interop", "FORMAT.md"),
        ("moe_lora_jax", "py.typed"),
    ):
        assert files("moe_lora_interop").parent.joinpath(package, data).is_file(), (
            f"{package}/{data} is not in the wheel"
        )
    golden = goldens / "native" / "top_k"
    read_and_convert(goldens / "layouts" / "poly" / "adapter")
    assert not FRAMEWORKS & sys.modules.keys(), "reading and converting imports a framework"
    shell(golden / "adapter", {"jax": {"jax"}, "torch": {"torch"}, "all": {"train", "torch", "plan"}}.get(extra, set()))
    if extra in ("jax", "all"):
        compare("JAX", in_jax(goldens / "base", golden / "adapter"), golden)
    if extra == "jax":
        assert not {"torch", "transformers", "peft"} & sys.modules.keys()
    if extra in ("torch", "all"):
        compare("PEFT", in_peft(goldens / "base", golden / "adapter"), golden)
    if extra == "torch":
        assert not {"jax", "flax"} & sys.modules.keys()


def read_and_convert(directory: Path) -> None:
    before = moe_lora_interop.read(directory)
    with tempfile.TemporaryDirectory() as folder:
        there, back = Path(folder, "there"), Path(folder, "back")
        moe_lora_interop.convert(directory, there, to="native")
        moe_lora_interop.convert(there, back, to="poly")
        after = moe_lora_interop.read(back)
    assert after.config == before.config
    for slot, tensor in before.tensors.items():
        assert np.array_equal(after.tensors[slot], tensor), slot


def shell(directory: Path, extras: set[str]) -> None:
    """The program of the wheel: what works here works, and what does not says which extra is missing."""
    program = Path(sys.executable).with_name("moe-lora")
    with tempfile.TemporaryDirectory() as folder:
        for arguments in (
            ["layouts"],
            ["inspect", directory],
            ["verify", directory],
            ["export", directory, f"{folder}/experts", "--as", "lora-experts"],
            ["export", directory, f"{folder}/lora", "--as", "lora", "--gates", "uniform"],
        ):
            done = subprocess.run([program, *arguments], capture_output=True, text=True)
            assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    for call, extra in CALLS.items():
        done = subprocess.run([program, *call.split()], capture_output=True, text=True)
        if extra in extras:
            assert done.returncode == 0, f"{call}: {done.stderr}"
        else:
            advice = f"pip install 'moe-lora-jax[{extra}]'"
            assert done.returncode == 2 and advice in done.stderr, f"{call}: {done.stderr!r}, expected {advice}"


def in_jax(base: Path, directory: Path) -> np.ndarray:
    import jax.numpy as jnp

    import moe_lora_jax as mlj

    assert mlj.__version__ == moe_lora_interop.__version__
    model = mlj.load_adapter(mlj.load_base_model(base), directory)
    return np.asarray(model(jnp.asarray(ids(directory.parent))))


def in_peft(base: Path, directory: Path) -> np.ndarray:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("default")  # peft and transformers warn of each other
        import peft
        import torch
        import transformers

        import moe_lora_interop.peft_tuner

        assert moe_lora_interop.peft_tuner.MoeLoraModel
        model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), directory)
        with torch.no_grad():
            return model(torch.tensor(ids(directory.parent))).logits.numpy()


def ids(golden: Path) -> np.ndarray:
    with np.load(golden / "outputs.npz") as archive:
        return archive["ids"]


def compare(name: str, logits: np.ndarray, golden: Path) -> None:
    with np.load(golden / "outputs.npz") as archive:
        expected = archive["logits"]
    difference = np.abs(logits - expected).max()
    assert difference < 1e-5 * np.abs(expected).max(), f"{name}: logits differ by {difference}"
    print(f"{name}: largest logit difference {difference:.1e}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    print(f"installed with extra {sys.argv[1]!r}: sound")
