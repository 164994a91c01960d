"""`moe-lora train --config FILE`, and TensorBoard events: the same run again, and the same numbers elsewhere."""

import json
import struct

import pytest
import yaml
from tensorboardX.proto.event_pb2 import Event
from tiny_training import compiled_once, small_dirs, tiny_model, token_data  # noqa: F401

from moe_lora_interop.cli import main as cli
from moe_lora_interop.cli.flags_file import flags
from moe_lora_interop.errors import ConfigError
from moe_lora_jax.cli.train import train
from moe_lora_jax.train.loop import train as run
from moe_lora_jax.train.settings import TrainSettings

pytestmark = pytest.mark.usefixtures("compiled_once")
FILES = ("adapter_model.safetensors", "adapter_config.json")


@pytest.fixture(scope="module")
def first(small_dirs, tmp_path_factory):  # noqa: F811
    """A run by flags."""
    out = tmp_path_factory.mktemp("runs") / "first"
    line = (
        f"train --model {small_dirs['base']} --data {small_dirs['data']} --output-dir {out} --steps 3 --batch-size 2 "
        "--max-length 100 --r 2 --lora-alpha 4 --num-experts 3 --top-k 2 --target-modules q_proj down_proj --seed 7 "
        "--lora-dropout 0.1 --eval-fraction 0.2 --learning-rate 1e-2 --max-grad-norm None --log-every 1"
    )
    assert cli.main(line.split()) == 0
    return out


def test_the_file_that_a_run_writes_repeats_it_to_the_bit(first, capfd):
    again = first.with_name("again")
    assert cli.main(["train", "--config", str(first / "train.yaml"), "--output-dir", str(again), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    for name in FILES:
        assert (again / name).read_bytes() == (first / name).read_bytes()
    one, two = (yaml.safe_load((out / "train.yaml").read_text()) for out in (first, again))
    assert two == {**one, "output_dir": str(again)}


def test_flags_win_and_another_seed_is_another_adapter(first):
    other = first.with_name("other")
    line = ["train", f"--config={first / 'train.yaml'}", "--output-dir", str(other), "--seed", "8", "--top-k", "None"]
    assert cli.main(line) == 0
    config = json.loads((other / "adapter_config.json").read_text())
    assert config["top_k"] is None and config["r"] == 2
    assert (other / FILES[0]).read_bytes() != (first / FILES[0]).read_bytes()


def test_the_file_continues_the_run_and_is_kept(first):
    before = (first / "train.yaml").read_text()
    assert cli.main(["train", "--config", str(first / "train.yaml"), "--resume", "--log-every", "5"]) == 0
    assert (first / "train.yaml").read_text() == before


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("learning_rat: 1", "learning_rat: unknown, expected one of .*; did you mean learning_rate?"),
        ("batch_size: {a: 1}", "batch_size: found a mapping, expected a value or a list"),
        ("lrr: 1", "lrr: unknown, expected one of .*; did you mean lr?"),
        ("lr: 1\nlearning_rate: 1", "lr: found beside learning_rate, expected one of the two"),
        ("config: other.yaml", "config: unknown"),
        ("- 1", "found list, expected a mapping"),
        ("a: [", "expected the node content"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, text, problem):
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        flags(train, file)


def test_a_file_may_use_the_short_name_of_a_flag(tmp_path):
    (tmp_path / "train.yaml").write_text("lr: 0.5")
    assert flags(train, tmp_path / "train.yaml") == ["--lr=0.5"]


def test_wrong_values_in_the_file_are_wrong_flags(tmp_path, capsys):
    file = tmp_path / "train.yaml"
    file.write_text("model: a\ndata: b\noutput_dir: c\nsteps: many\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--config", str(file)])
    assert caught.value.code == 2 and "--steps" in capsys.readouterr().err
    assert cli.main(["train", "--config", str(tmp_path / "missing.yaml")]) == 2
    assert "missing.yaml" in capsys.readouterr().err


def test_a_call_in_python_takes_no_file(tmp_path):
    with pytest.raises(ConfigError, match="config: read by the command line only"):
        train(tmp_path, tmp_path, tmp_path, config=tmp_path / "train.yaml")


def events(folder) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} of every event file: records of length, checksum, event, checksum."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in folder.iterdir():
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def from_records(out) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (out / "training" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name not in ("step", "router"):
                found.setdefault(name, []).append((record["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_events_say_what_the_records_say_and_resuming_repeats_no_step(tmp_path, monkeypatch):
    from moe_lora_jax.train import loop

    settings = TrainSettings(steps=6, batch_size=2, log_every=1, checkpoint_every=2, tensorboard=True)
    advance = loop._Loop.advance

    def advance_or_crash(self, show):
        advance(self, show)
        if self.step == 5:
            raise MemoryError  # steps 1 to 5 are logged, the last checkpoint is of step 4

    evaluation = token_data(3, seed=9)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(loop._Loop, "advance", advance_or_crash)
        run(tiny_model(), token_data(6), tmp_path, settings, eval_data=evaluation)
    folder = tmp_path / "training" / "tensorboard"
    assert [step for step, _ in events(folder)["loss"]] == [1, 2, 3, 4, 5]
    resumed = TrainSettings(**{**settings.__dict__, "resume": True})
    run(tiny_model(), token_data(6), tmp_path, resumed, eval_data=evaluation)
    assert events(folder) == from_records(tmp_path)
    assert [step for step, _ in events(folder)["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in events(folder)["eval_loss"]] == [0, 6]


def test_no_events_unless_asked_for(first):
    assert not (first / "training" / "tensorboard").exists()
