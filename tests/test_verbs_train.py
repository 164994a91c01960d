"""`moe-lora train` through its arguments, on a model directory."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro
from tiny_training import compiled_once, small_dirs  # noqa: F401

import moe_lora_interop
from moe_lora_interop.cli import main as cli
from moe_lora_interop.cli.flags_file import flag_names
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_jax.cli.train import train
from moe_lora_jax.demo.topics import TOPICS, in_words, questions, sentences
from tests.verbs import train_verb

pytestmark = pytest.mark.usefixtures("compiled_once")
SMALL = {"batch_size": 2, "max_length": 100, "r": 2, "target_modules": ("q_proj", "v_proj")}


@pytest.fixture(scope="module")
def base(small_dirs) -> Path:  # noqa: F811
    return small_dirs["base"]


@pytest.fixture(scope="module")
def data(small_dirs) -> Path:  # noqa: F811
    return small_dirs["data"]


def test_the_command_line_trains_and_saves(base, data, tmp_path, capsys):
    out = tmp_path / "out"
    line = (
        f"--model {base} --data {data} --output-dir {out} --steps 3 --batch-size 2 --max-length 100 --r 2 "
        "--num-experts 3 --top-k 2 --target-modules q_proj down_proj --eval-fraction 0.2 --eval-every 2 "
        "--checkpoint-every 2 --router-aux-loss-coef 0.01 --learning-rate 1e-2 --warmup-steps 1 "
        "--weight-decay 0.1 --train-only all"
    )
    assert tyro.cli(train, args=line.split()) is None
    printed = capsys.readouterr().out
    assert "16 examples" in printed and "evaluation: " in printed and "4 examples" in printed
    assert f"adapter saved in {out}" in printed
    config = moe_lora_interop.read(out).config
    assert (config.r, config.num_experts, config.top_k) == (2, 3, 2)
    assert config.base_model_name_or_path == str(base) and config.task_type == "CAUSAL_LM"
    assert {m.rsplit(".")[-1] for m in config.target_modules} == {"q_proj", "down_proj"}
    records = [json.loads(x) for x in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 2, 3]


def test_packed_rows_are_counted_on_the_command_line(base, data, tmp_path, capsys):
    line = f"--model {base} --data {data} --output-dir {tmp_path / 'out'} --packing --batch-size 2 --max-length 512"
    assert tyro.cli(train, args=f"{line} --target-modules q_proj --r 2 --num-experts 2".split()) is None
    shown = capsys.readouterr()
    rows = int(re.search(r"packing: 20 examples in (\d+) rows of 512 tokens, [\d.]+% full", shown.out)[1])
    assert rows < 20 and f"step {-(-rows // 2)} of {-(-rows // 2)}: loss" in shown.err


def test_a_directory_that_is_taken_is_refused_before_the_model_is_read(data, tmp_path):
    (tmp_path / "out" / "training").mkdir(parents=True)
    (tmp_path / "out" / "training" / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="already holds a run"):
        train_verb(tmp_path / "no model", data, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no run has started there"):
        train_verb(tmp_path / "no model", data, tmp_path / "other", resume=True)


def test_truncation_is_printed(base, data, tmp_path, capsys):
    train_verb(base, data, tmp_path / "out", steps=1, **{**SMALL, "max_length": 70})
    assert "cut at max_length (lines" in capsys.readouterr().out


def test_an_eval_file(base, data, tmp_path, capsys):
    train_verb(base, data, tmp_path / "out", steps=1, eval_file=data, **SMALL)
    assert "evaluation loss" in capsys.readouterr().out


def test_training_continues_from_an_adapter(base, data, tmp_path):
    train_verb(base, data, tmp_path / "one", steps=2, num_experts=3, **SMALL)
    train_verb(base, data, tmp_path / "two", steps=1, learning_rate=1e-12, init_adapter=tmp_path / "one",
          batch_size=2, max_length=100, router_aux_loss_coef=0.5)  # fmt: skip
    one, two = moe_lora_interop.read(tmp_path / "one"), moe_lora_interop.read(tmp_path / "two")
    train_verb(base, data, tmp_path / "three", steps=1, init_adapter=tmp_path / "two", batch_size=2, max_length=100,
          router_z_loss_coef=0.25)  # fmt: skip
    config = moe_lora_interop.read(
        tmp_path / "three"
    ).config  # what is not given is kept, also where the default is another
    assert (config.router_aux_loss_coef, config.router_z_loss_coef, config.r) == (0.5, 0.25, 2)
    line = (
        f"--model {base} --data {data} --output-dir {tmp_path / 'four'} --init-adapter {tmp_path / 'three'} --steps 1"
    )
    tyro.cli(train, args=[*line.split(), "--router-aux-loss-coef", "0", "--batch-size", "2", "--max-length", "100"])
    config = moe_lora_interop.read(tmp_path / "four").config  # 0 is given, although it is the default
    assert (config.router_aux_loss_coef, config.router_z_loss_coef) == (0.0, 0.25)
    assert two.config.num_experts == 3 and two.config.router_aux_loss_coef == 0.5
    for key, tensor in one.tensors.items():
        assert abs(two.tensors[key] - tensor).max() < 1e-9
    with pytest.raises(ConfigError) as caught:
        train_verb(base, data, tmp_path / "five", init_adapter=tmp_path / "one", r=5, adapter_config=tmp_path / "x")
    assert caught.value.problems == ("r: found beside init_adapter", "adapter_config: found beside init_adapter")


def test_a_preset_is_that_of_the_config_and_flags_win(base, data, tmp_path):
    file = tmp_path / "fields.json"
    file.write_text(json.dumps({"r": 3, "router_aux_loss_coef": 0.5}))
    fields = {"preset": "adamole", "adapter_config": file, "num_experts": 5, "target_modules": ("q_proj",)}
    train_verb(base, data, tmp_path / "out", steps=1, batch_size=2, max_length=100, **fields)
    config = moe_lora_interop.read(tmp_path / "out").config
    assert (config.adaptive_threshold, config.threshold, config.num_experts) == (
        True,
        1 / 5,
        5,
    )  # 1 / E, of the flag's E
    assert (config.r, config.router_aux_loss_coef) == (3, 0.5)
    with pytest.raises(ConfigError) as caught:
        train_verb(base, data, tmp_path / "two", init_adapter=tmp_path / "out", preset="mola")
    assert caught.value.problems == ("preset: found beside init_adapter",)


def test_fields_without_a_flag_come_from_a_file(base, data, tmp_path):
    file = tmp_path / "fields.json"
    file.write_text(json.dumps({"rank_pattern": {"v_proj": 3}, "scoring_func": "sigmoid"}))
    train_verb(base, data, tmp_path / "out", steps=1, adapter_config=file, **SMALL)
    config = moe_lora_interop.read(tmp_path / "out").config
    assert config.rank_pattern == {"v_proj": 3} and config.scoring_func == "sigmoid" and config.r == 2
    file.write_text(json.dumps({"r": 3, "num_experts": 3, "top_k": 2, "lora_alpha": 32}))
    train_verb(base, data, tmp_path / "won", steps=1, adapter_config=file, lora_alpha=16, top_k="all", **SMALL)
    config = moe_lora_interop.read(tmp_path / "won").config  # given flags win, even with the value of the default
    assert (config.r, config.num_experts, config.top_k, config.lora_alpha) == (2, 3, None, 16)
    file.write_text(json.dumps({"top_q": 1}))
    with pytest.raises(ConfigError, match="top_q: unknown field"):
        train_verb(base, data, tmp_path / "out2", adapter_config=file)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"eval_fraction": 1.0}, "eval_fraction: found 1.0"),
        ({"eval_fraction": 0.1, "eval_file": Path("x")}, "eval_fraction and eval_file: found both"),
        ({"max_length": 1}, "max_length: found 1"),
        ({"steps": 0}, "steps: found 0"),
        ({"save_best": True}, "save_best: found without evaluation data, expected eval_file or eval_fraction"),
        ({"top_k": 9}, "top_k: found 9, expected at most num_experts = 4"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(tmp_path, arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        train_verb(tmp_path / "no_model", tmp_path / "no_data", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_a_clear_error(base, data, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 1}\n')
    with pytest.raises(CheckpointError, match=r"bad.jsonl:2: text: found int"):
        train_verb(base, bad, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        train_verb(tmp_path, data, tmp_path / "out")
    with pytest.raises(ConfigError, match="did you mean q_proj"):
        train_verb(base, data, tmp_path / "out", target_modules=("q_pro",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_printed_command_continues(base, data, tmp_path, tally, number):
    """In a process of its own, as a batch system would do it."""
    run = "import sys, tyro; from moe_lora_jax.cli.train import train; sys.exit(tyro.cli(train, args=sys.argv[1:]))"
    out = tmp_path / "out"
    arguments = shlex.split(
        f"--model {base} --data {data} --output-dir {out} --steps 4000 --batch-size 2 --max-length 100 --r 2 "
        "--target-modules q_proj --log-every 1"
    )
    command = [sys.executable, "-c", run, *arguments]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        metrics = out / "training" / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == (0 if number == signal.SIGTERM else 130), errors
    assert "stopped after step" in printed and "of 4000; the checkpoint is saved" in printed
    last = printed.strip().splitlines()[-1].strip()
    assert last == shlex.join(["-c", *arguments, "--resume"])
    step = int(printed.split("stopped after step ")[1].split(" ")[0])
    assert (out / "training" / "checkpoints" / str(step)).is_dir()
    assert cli.main(f"generate --model {base} --adapter {out} --prompt hi --max-new-tokens 2 --quiet".split()) == 0
    assert "%" not in errors and "Traceback" not in errors
    tally(f"runs ended by {number.name}", tried=1, lost=0)


def test_the_best_adapter_and_the_commands_are_in_the_output_directory(base, data, tmp_path, capsys):
    flags = {"eval_fraction": 0.2, "eval_every": 1, "save_best": True, "keep": 1, "checkpoint_every": 1, **SMALL}
    train_verb(base, data, tmp_path / "out", steps=2, **flags)
    capsys.readouterr()
    train_verb(base, data, tmp_path / "out", steps=3, resume=True, **flags)
    best = json.loads((tmp_path / "out" / "best" / "best.json").read_text())
    said = f"lowest evaluation loss {best['eval_loss']:.4f}, after step {best['step']}: {tmp_path / 'out' / 'best'}"
    assert said in capsys.readouterr().out
    assert moe_lora_interop.read(tmp_path / "out" / "best").config == moe_lora_interop.read(tmp_path / "out").config
    assert [p.name for p in (tmp_path / "out" / "training" / "checkpoints").iterdir()] == ["3"]
    lines = (tmp_path / "out" / "training" / "starts.jsonl").read_text().splitlines()
    starts = [json.loads(line) for line in lines]
    assert [(s["step"], s["total_steps"]) for s in starts] == [(0, 2), (2, 3)]
    assert {s["command"] for s in starts} == {shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])}


def test_the_made_up_texts_are_distinct_and_repeatable():
    made = questions(20, 0)
    assert made == questions(20, 0) != questions(20, 1)
    assert len(set(made)) == len(made) == 20 * len(TOPICS)
    assert len(set(sentences(20, 0))) == 20 * len(TOPICS)
    with pytest.raises(ValueError, match="fewer than"):
        questions(10_000, 0)


def test_made_up_sums_are_right():
    numbers = {in_words(n): n for n in range(100)}
    assert len(numbers) == 100
    for q in (q for q in questions(50, 3) if q.topic == "arithmetic"):
        left, result = q.completion.strip(" .").split(" is ")
        a, op, b = left.replace(" plus ", "|plus|").replace(" minus ", "|minus|").split("|")
        assert numbers[result] == (numbers[a] + numbers[b] if op == "plus" else numbers[a] - numbers[b])


def test_the_help_names_every_flag_once_and_says_what_holds_without_it(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(train, args=["--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    r = moe_lora_interop.MoeLoraConfig.r
    assert f"rank of one expert, or one rank per expert. (default: {r})" in words
    assert "all-linear (all but lm_head). (default: all-linear)" in words
    assert "--lr FLOAT, --learning-rate FLOAT" in words
    for name in flag_names(train):
        flag = f"--{name.replace('_', '-')}"
        assert len(re.findall(rf"{flag},? (?=INT|FLOAT|PATH|STR|{{|\[|--no-)", words)) == 1, name


def test_the_short_name_of_the_learning_rate(base, data, tmp_path):
    train_verb(base, data, tmp_path / "out", steps=1, lr=0.5, **SMALL)
    record = json.loads((tmp_path / "out" / "training" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["learning_rate"] == 0.5
