"""Several processes of `jax.distributed` on this machine: one curve, one writer, one end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mesh_base import adapted, write_base
from process_worker import PROMPTS, RUN
from tiny_training import small_dirs, token_data  # noqa: F401

import moe_lora_interop
import moe_lora_jax as mlj
from moe_lora_interop.checkpoint.run_records import read_metrics
from moe_lora_jax.train import TrainSettings, train

TESTS = Path(__file__).parent
FLAGS = (
    "--batch-size 4 --max-length 100 --r 2 --num-experts 4 --top-k 2 --log-every 1 --eval-fraction 0.2 --eval-every 3 "
    "--checkpoint-every 2 --learning-rate 1e-2 --lora-dropout 0.1"
).split()


def start(command: list, devices: int) -> subprocess.Popen:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    paths = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    log = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env={**os.environ, **flags, **paths}, **log)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def ended(processes: list[subprocess.Popen], timeout: float = 240) -> list[str]:
    """What they printed; all must have ended with 0."""
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text[-3000:]
    return printed


def workers(mode: str, directory: Path, number: int = 2, devices: int = 2) -> list[subprocess.Popen]:
    port = free_port()
    script = TESTS / "process_worker.py"
    return [start([script, mode, port, number, own, directory], devices) for own in range(number)]


def answers(mode: str, directory: Path, **fields) -> list:
    ended(workers(mode, directory, **fields))
    return [json.loads(file.read_text()) for file in sorted(directory.glob(f"{mode}-*.json"))]


def runs(dirs: dict, out: Path, mesh: str, number: int, devices: int, *more: str) -> list[subprocess.Popen]:
    """`moe-lora train` in so many processes."""
    given = ["--model", dirs["base"], "--data", dirs["data"], "--output-dir", out, *FLAGS, *more]
    command = [
        "-c",
        "import sys; from moe_lora_interop.cli.main import main; sys.exit(main())",
        "train",
        *given,
        *(["--mesh", *mesh.split()] if mesh else []),
    ]
    port = free_port()
    joined = [
        ["--coordinator", f"localhost:{port}", "--num-processes", number, "--process-id", i] for i in range(number)
    ]
    return [start([*command, *(joined[i] if number > 1 else [])], devices) for i in range(number)]


def losses(out: Path) -> list[float]:
    return [record.get("lm_loss", record.get("eval_loss")) for record in read_metrics(out)]


@pytest.fixture(scope="module")
def alone(small_dirs, tmp_path_factory) -> Path:  # noqa: F811
    """Six steps in one process on one device."""
    out = tmp_path_factory.mktemp("alone") / "out"
    ended(runs(small_dirs, out, "", 1, 1, "--steps", "6"))
    return out


def assert_same(out: Path, alone: Path, measured) -> None:
    difference = np.abs(np.subtract(losses(out), losses(alone)))
    tensors, expected = moe_lora_interop.read(out).tensors, moe_lora_interop.read(alone).tensors
    assert tensors.keys() == expected.keys()
    weights = max(np.abs(tensors[slot] - expected[slot]).max() for slot in expected)
    measured("losses of processes", difference.max())
    measured("adapters of processes", weights)
    assert difference.max() < 1e-5 and weights < 2e-4, (difference, weights)


def test_the_curve_is_that_of_one_process(small_dirs, alone, tmp_path, measured, tries):  # noqa: F811
    cases = [(2, 2, "data=2 fsdp=2"), (4, 1, ""), (4, 1, "fsdp=2 tensor=2")]
    for number, devices, mesh in cases[: tries(1, 3)]:
        out = tmp_path / f"{number} {mesh}"
        first, *others = ended(runs(small_dirs, out, mesh, number, devices, "--steps", "6"))
        assert f"adapter saved in {out}" in first
        assert not any("saved" in text or "examples" in text for text in others), others
        assert_same(out, alone, measured)


def test_a_signal_to_one_stops_all_and_another_number_goes_on(small_dirs, alone, tmp_path, measured):  # noqa: F811
    out = tmp_path / "out"
    processes = runs(small_dirs, out, "fsdp=2 tensor=2", 2, 2, "--steps", "6", "--eval-every", "1")
    for _ in range(3000):  # it compiles first, on a machine that may have other work
        time.sleep(0.1)
        if any("lm_loss" in record for record in read_metrics(out)):
            break
    processes[1].send_signal(signal.SIGTERM)
    first, _ = ended(processes)
    stopped = max(int(step.name) for step in (out / "training" / "checkpoints").iterdir())
    assert f"stopped after step {stopped} of 6" in first and moe_lora_interop.read(out)
    assert 0 < stopped < 6, "stopped too late to show anything"
    ended(runs(small_dirs, out, "fsdp=4", 1, 4, "--steps", "6", "--resume"))
    kept = [record["lm_loss"] for record in read_metrics(out) if "lm_loss" in record]
    expected = [record["lm_loss"] for record in read_metrics(alone) if "lm_loss" in record]
    np.testing.assert_allclose(kept, expected, atol=1e-5)


def test_the_others_end_when_one_is_killed(tmp_path):
    write_base(tmp_path / "base")
    first, second = workers("train", tmp_path)
    for _ in range(1200):
        time.sleep(0.1)
        if len(read_metrics(tmp_path / "killed")) > 4:
            break
    second.kill()
    printed, _ = first.communicate(timeout=120)
    assert first.returncode != 0 and "another task died" in printed, printed[-3000:]
    second.communicate()
    steps = [step.name for step in (tmp_path / "killed" / "training" / "checkpoints").iterdir()]
    newest = max(int(step) for step in steps if step.isdigit())  # one that was being written has another name
    model = adapted(tmp_path / "base", None)
    taken_up = []

    class Enough(Exception):
        pass

    def enough(step, _):
        taken_up.append(step)
        raise Enough

    with pytest.raises(Enough):
        settings = TrainSettings(steps=5000, **RUN, eval_every=1, resume=True)
        train(model, token_data(64), tmp_path / "killed", settings, eval_data=token_data(4), on_eval=enough)
    assert newest >= 2 and taken_up == [newest + 1]


def test_an_adapter_that_no_process_has_whole(tmp_path):
    base = write_base(tmp_path / "base")
    found = answers("adapter", tmp_path)
    assert all(answer["no process has whole"] > 0 for answer in found)
    one = mlj.load_adapter(mlj.load_base_model(base), tmp_path / "adapter")
    expected = np.asarray(mlj.generate(one, PROMPTS, max_new_tokens=6)).tolist()
    for answer in found:
        assert answer["before"] == answer["after"] == expected
        assert len(answer["exact"]) > 0 and all(answer["exact"].values())


def test_what_the_first_process_is_refused_all_are_told(tmp_path):
    write_base(tmp_path / "base")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "held" / "training").mkdir(parents=True)
    (tmp_path / "held" / "training" / "run.json").write_text("{}")
    found = answers("refused", tmp_path)
    for messages in found:
        for message, words in zip(messages, ("cannot write", "already holds a run", "file"), strict=True):
            assert words in message, messages


def test_no_process_holds_the_whole_model(tmp_path, measured):
    write_base(tmp_path / "base")
    write_base(tmp_path / "large", hidden_size=512, intermediate_size=1536, num_hidden_layers=8, vocab_size=8192)
    for answer in answers("memory", tmp_path, devices=1):
        measured("peak of memory when loading on two processes, of the model", answer["grown"] / answer["model"])
        assert answer["here"] <= 0.51 * answer["model"]
        largest = 8192 * 512 * 4
        assert answer["grown"] <= answer["here"] + largest, answer
