"""Out of memory, really provoked: it ends with the cause, the next steps and an exit code of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_training import compiled_once, small_dirs  # noqa: F401

import moe_lora_interop
from moe_lora_interop.cli import inspect_verify as verbs
from moe_lora_interop.cli import main as cli
from moe_lora_interop.errors import OutOfMemoryError
from moe_lora_interop.memory import explained, is_out_of_memory
from moe_lora_jax.models.attending import choice
from moe_lora_jax.train.checkpoints import Checkpoints, Snapshot
from tests.adapters import make_adapter

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 320_000  # their attention, four heads of fp32, takes 1.6 TB
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
promises_everything = pytest.mark.skipif(
    not OVERCOMMIT.exists() or OVERCOMMIT.read_text().strip() == "1",
    reason="this system promises any memory and ends the process when it is used: nothing to catch",
)


@pytest.fixture(scope="module")
def long(small_dirs, compiled_once):  # noqa: F811
    """A base model and a file with one text that is far too long."""
    text = "the soup is hot " * (TOKENS // 10)
    (small_dirs["data"].parent / "long.jsonl").write_text(json.dumps({"text": text}) + "\n")
    return small_dirs["base"], small_dirs["data"].parent / "long.jsonl", text


@promises_everything
def test_train(long, tmp_path, capfd):
    base, data, _ = long
    line = f"train --model {base} --data {data} --output-dir {tmp_path / 'out'} --max-length {TOKENS} --batch-size 2"
    line += " --attention plain"  # all scores at once: block by block they would fit
    assert cli.main([*line.split(), "--steps", "1", "--target-modules", "q_proj"]) == 3
    shown = capfd.readouterr().err
    assert f"out of memory while training with batches of 2 rows of up to {TOKENS} tokens" in shown
    assert "Out of memory allocating" in shown and "Traceback" not in shown
    for step in ("batch_size", "max_length", "scan_layers", "bfloat16", "num_experts", "another output_dir"):
        assert step in shown


@promises_everything
def test_generate(long, capfd, monkeypatch):
    monkeypatch.setattr(choice, "SHORT", TOKENS**3)  # then all scores at once here, too
    base, _, text = long
    assert cli.main(["generate", "--model", str(base), "--prompt", text, "--max-new-tokens", "4"]) == 3
    shown = capfd.readouterr().err
    assert "out of memory while generating 4 tokens after" in shown and "found: Out of memory allocating" in shown
    assert "max_new_tokens" in shown and "bfloat16" in shown and "Traceback" not in shown


CONVERT = """
import resource, sys
import moe_lora_interop.cli.convert, tyro, rich.progress
from moe_lora_interop.cli.main import main
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 2**24,) * 2)
sys.exit(main(sys.argv[1:]))
"""


def test_convert(tmp_path):
    """In a process that gets 16 MB more than it has, with tensors of 64 MB."""
    config = {"r": 8, "num_experts": 8, "target_modules": ["q_proj"]}
    moe_lora_interop.write(make_adapter({"model.layers.0.self_attn.q_proj": (2**18, 8)}, **config), tmp_path / "in")
    command = [sys.executable, "-c", CONVERT, "convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "native"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("moe-lora convert: out of memory while converting:\n  - found: ")
    assert "safetensors file is read tensor by tensor" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def too_much_of_torch():
    return torch.empty(2**46, dtype=torch.uint8)


@promises_everything
@pytest.mark.parametrize(
    "too_much", [lambda: np.empty(2**46, np.uint8), lambda: jnp.zeros((2**20, 2**26), jnp.uint8), too_much_of_torch]
)
def test_every_framework_is_recognised(too_much):
    with pytest.raises(Exception) as caught:  # noqa: B017  which type it is, is their affair
        too_much()
    assert is_out_of_memory(caught.value)
    with pytest.raises(OutOfMemoryError, match="out of memory while at work:\n  - found: .*\n  - do less"):
        with explained("at work", ["do less"]):
            too_much()


def test_the_error_of_torch_on_a_gpu_and_other_errors():
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError(28, "No space left on device")):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error)) as caught, explained("at work", []):
            raise error
        assert caught.value is error


def test_a_verb_that_says_nothing_of_its_own(monkeypatch, capfd):
    monkeypatch.setattr(verbs.checks, "inspect", lambda *args: np.empty(2**62, np.uint8))
    assert cli.main(["inspect", "."]) == 3
    shown = capfd.readouterr().err
    assert shown.startswith("moe-lora inspect: out of memory while working:\n  - found: Unable to allocate 4.00 EiB")
    assert "a machine with more memory" in shown


def test_a_checkpoint_that_does_not_fit_is_not_called_damaged(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(checkpoints._manager, "all_steps", lambda: [3])
    monkeypatch.setattr(checkpoints, "_read", lambda step, like: np.empty(2**62, np.uint8))
    with pytest.raises(MemoryError):
        checkpoints.restore(Snapshot(3, {}, {}, {}))
