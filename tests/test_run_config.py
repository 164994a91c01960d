"""`moe-lora train --config FILE`, and TensorBoard events: the same run again, and the same numbers elsewhere."""

import importlib.util
import json
import os
import shlex
import struct
import subprocess
import sys
from types import ModuleType

import pytest
import yaml
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tiny_training import compiled_once, small_dirs, tiny_model, token_data  # noqa: F401

from moe_lora_interop.cli import main as cli
from moe_lora_interop.cli.flags_file import flags
from moe_lora_interop.errors import ConfigError
from moe_lora_jax.cli.train import train
from moe_lora_jax.cli.train_flags import SettingsFlags
from moe_lora_jax.train.errors import TrainingError
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


ABOUT = ("_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info", "command/text_summary")


def summaries(folder):
    """(step, value) of every event file: records of length, checksum, event, checksum."""
    for file in folder.iterdir():
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            yield from ((event.step, value) for value in event.summary.value)


def events(folder) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} of the numbers."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, value in summaries(folder):
        if value.tag not in ABOUT:
            found.setdefault(value.tag, []).append((step, value.simple_value))
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

    settings = TrainSettings(steps=6, batch_size=2, log_every=1, checkpoint_every=2, report_to=("tensorboard",))
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


def test_events_hold_the_hyperparameters_and_the_command(tmp_path):
    settings = TrainSettings(steps=1, batch_size=2, learning_rate=0.5, report_to=("tensorboard",))
    run(tiny_model(), token_data(6), tmp_path, settings)
    told = {value.tag: value for _, value in summaries(tmp_path / "training" / "tensorboard") if value.tag in ABOUT}
    (command,) = told["command/text_summary"].tensor.string_val
    assert command.decode() == shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    data = HParamsPluginData.FromString(told["_hparams_/session_start_info"].metadata.plugin_data.content)
    shown = data.session_start_info.hparams
    assert shown["settings.learning_rate"].number_value == 0.5 and shown["adapter.num_experts"].number_value == 3
    assert shown["settings.train_only"].string_value == "all" and shown["command"].string_value == command.decode()


class Wandb(ModuleType):
    """What of the package wandb is used, noting what it is told. The real one: the test after these."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logs, self.ends = [], [], []

    def init(self, **fields):
        self.inits.append(fields)
        return self

    def log(self, values, step):
        self.logs.append((step, values))

    def finish(self, exit_code):
        self.ends.append(exit_code)


def test_wandb_is_told_what_the_records_say_and_a_continuation_is_the_same_run(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    fields = {"batch_size": 2, "log_every": 1, "report_to": ("wandb",)}
    run(tiny_model(), token_data(6), tmp_path, TrainSettings(steps=2, **fields), eval_data=token_data(3, seed=9))
    run(tiny_model(), token_data(6), tmp_path, TrainSettings(steps=3, resume=True, **fields),
        eval_data=token_data(3, seed=9))  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "training" / "metrics.jsonl").read_text().splitlines()]
    assert [(step, {"step": step, **values}) for step, values in wandb.logs] == [
        (r["step"], {name: value for name, value in r.items() if name != "router"}) for r in records
    ]  # and nothing twice
    assert wandb.ends == [0, 0]
    one, two = wandb.inits
    assert one["id"] == two["id"] == (tmp_path / "training" / "wandb" / "id").read_text()
    assert (one["project"], one["name"], one["dir"]) == ("moe-lora", tmp_path.name, str(tmp_path / "training"))
    assert [fields["config"]["settings"]["steps"] for fields in wandb.inits] == [2, 3]
    assert one["config"]["adapter"]["num_experts"] == 3
    assert one["config"]["command"] == shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


def test_wandb_taken_up_later_gets_the_whole_curve_and_a_failure_is_told(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(tiny_model(), token_data(6), tmp_path, TrainSettings(steps=2, batch_size=2, log_every=1))
    assert not wandb.inits  # it is imported and called only where it is asked for
    later = TrainSettings(steps=4, batch_size=2, log_every=1, resume=True, report_to=("wandb",))
    with pytest.raises(ZeroDivisionError):
        run(tiny_model(), token_data(6), tmp_path, later, on_log=lambda step, _: 1 / (3 - step))
    assert [step for step, _ in wandb.logs] == [1, 2, 3] and wandb.ends == [1]


def test_wandb_missing_or_refusing_is_an_error_in_words(tmp_path, monkeypatch):
    settings = TrainSettings(steps=1, batch_size=2, report_to=("wandb",))
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it then fails
    with pytest.raises(TrainingError, match=r"pip install 'moe-lora-jax\[wandb\]'"):
        run(tiny_model(), token_data(6), tmp_path / "missing", settings)
    wandb = Wandb()

    def refuse(**_):
        raise wandb.Error("no API key")

    wandb.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(TrainingError, match="cannot report to Weights & Biases.*\n.*no API key"):
        run(tiny_model(), token_data(6), tmp_path / "refused", settings)


def test_wandb_itself_offline(small_dirs, tmp_path):  # noqa: F811
    """The file that `wandb sync` would send, in a process of its own."""
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("needs the extra wandb (pip install 'moe-lora-jax[wandb]')")
    out = tmp_path / "out"
    line = f"train --model {small_dirs['base']} --data {small_dirs['data']} --output-dir {out} --steps 2 --batch-size 2"
    line += " --max-length 100 --num-experts 3 --target-modules q_proj --log-every 1 --report-to wandb tensorboard"
    command = [sys.executable, "-c", "from moe_lora_interop.cli.main import main; main()", *line.split()]
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, "WANDB_MODE": "offline"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    (file,) = (out / "training" / "wandb").glob("offline-run-*/*.wandb")
    sent = file.read_bytes()
    records = [json.loads(text) for text in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(str(record["lm_loss"]).encode() in sent for record in records)
    for words in (shlex.join(["-c", *line.split()]), '"num_experts":3', '"steps":2'):
        assert words.encode() in sent


def test_who_is_reported_to(tmp_path):
    assert SettingsFlags(tensorboard=True).checked().report_to == ("tensorboard",)  # as train.yaml said it before
    assert SettingsFlags(tensorboard=True, report_to=("wandb",)).checked().report_to == ("tensorboard", "wandb")
    for wrong in ("wandb", ("mlflow",)):
        with pytest.raises(ConfigError, match="report_to: found .*, expected a list of some of tensorboard, wandb"):
            TrainSettings(report_to=wrong)


def test_on_log_is_told_every_record_when_it_is_written(tmp_path):
    told = []

    def listen(step, metrics):
        last = (tmp_path / "training" / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last) == {"step": step, **metrics}
        told.append((step, "eval_loss" in metrics))

    settings = TrainSettings(steps=4, batch_size=2, log_every=2)
    run(tiny_model(), token_data(6), tmp_path, settings, eval_data=token_data(3, seed=9), on_log=listen)
    assert told == [(0, True), (1, False), (2, False), (4, False), (4, True)]
