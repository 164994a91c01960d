"""Every verb under --quiet and --json, and what it shows on a terminal while it works."""

import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from typing import get_type_hints

import pytest
from rich.console import Console
from rich.progress import Progress
from tiny_training import compiled_once, small_dirs  # noqa: F401

from moe_lora_interop.cli import main as cli
from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.progress import tracked
from moe_lora_interop.progress_bar import progress
from moe_lora_jax.cli import log_lines

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).resolve().parents[1]
VERBS = {point.name: point for point in entry_points(group=cli.GROUP)}

# verb: its command, what is asked for as text even under --quiet ("" where it writes files), stages on a terminal
COMMANDS = {
    "inspect": ("inspect trained", "layout", ["reading"]),
    "verify": ("verify trained", "sound", ["checking"]),
    "layouts": ("layouts", "xlora", []),
    "convert": ("convert trained OUT --to mole", "", ["converting"]),
    "combine": (
        "combine experts/expert_0 experts/expert_1 OUT",
        "",
        ["reading the adapters", "2/2", "writing the mixture"],
    ),
    "export": ("export trained OUT --as lora --gates uniform", "", ["joining the experts of each module"]),
    "measure": (
        "measure trained --base base --data data.jsonl --mean-gates OUT/means.json --exported experts",
        "expert_1",
        ["measuring the mean gates", "measuring what it costs", "4/4"],
    ),
    "train": (
        "train --model base --data data.jsonl --output-dir OUT --steps 2 --num-experts 2 --target-modules q_proj",
        "",
        ["starting JAX", "reading the model and the data", "compiling the step", "training: loss", "2/2"],
    ),
    "push": ("push trained user/trained", "", ["checking", "uploading to user/trained"]),
    "data": ("data data.jsonl --model base", "line 1, ", ["reading"]),
    "plan": (
        "plan --config base --topology v5e:1x1 --seq 16 --batch 1 --num-experts 2 --target-modules q_proj",
        "fits",
        ["compiling for v5e:1x1"],
    ),
    "generate": (
        "generate --model base --adapter trained --prompt hi --max-new-tokens 3",
        "\n",
        ["reading the model", "reading the adapter", "compiling, then generating"],
    ),
    "report": (
        "report trained --model base --data data.jsonl --output OUT/report.html",
        "",
        ["reading the adapter and the model", "running the routers over the data", "drawing"],
    ),
    "quickstart": (
        "quickstart --output-dir OUT --model base --data data.jsonl --num-experts 2 --steps 2",
        "",
        ["training: loss", "answering held-out prompts", "running the routers over held-out examples"],
    ),
    "run": ("run -- python script.py", "its own words", ["importing PyTorch and PEFT"]),
}  # fmt: skip


def test_the_two_flags_are_of_every_verb_and_defined_once():
    assert set(COMMANDS) == set(VERBS)
    for name, point in VERBS.items():
        hints = get_type_hints(point.load(), include_extras=True)
        assert hints["quiet"] is Quiet, name
        assert name == "run" or hints["json"] is Json, name  # what a script prints is the script's affair
        defaults = inspect.signature(point.load()).parameters
        assert {defaults[flag].default for flag in ("quiet", "json") if flag in defaults} == {False}, name


@pytest.fixture(scope="module")
def furnished(tmp_path_factory, small_dirs, compiled_once):  # noqa: F811
    made = tmp_path_factory.mktemp("furnished")
    shutil.copytree(small_dirs["base"], made / "base")
    shutil.copy(small_dirs["data"], made / "data.jsonl")
    (made / "script.py").write_text("print('its own words')")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        sizes = "--num-experts 3 --top-k 2 --r 2 --steps 1 --target-modules q_proj --quiet"
        assert not cli.main(f"train --model base --data data.jsonl --output-dir trained {sizes}".split())
        assert not cli.main("export trained experts --as lora-experts --quiet".split())
    return made


@pytest.fixture
def every_update_is_drawn(monkeypatch):
    """And not ten a second."""
    update = Progress.update
    monkeypatch.setattr(Progress, "update", lambda *args, **fields: update(*args, **fields, refresh=True))


def in_a_file(flag: str, out: Path, furnished: Path) -> tuple[str, str, list[dict]]:
    """What `train` prints to stdout and to stderr, which are files, with a warning and evaluations; its records."""
    words = f"train --model base --data data.jsonl --output-dir {out} --steps 6 --log-every 3 --top-k 1 {flag}"
    words += " --num-experts 2 --target-modules q_proj --eval-fraction 0.2 --eval-every 3"
    command = [sys.executable, "-c", "from moe_lora_interop.cli.main import main; main()", *words.split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, cwd=furnished, env=environment, capture_output=True, text=True, check=True)
    records = (out / "training" / "metrics.jsonl").read_text().splitlines()
    return done.stdout, done.stderr, [json.loads(line) for line in records]


WARNING = r"moe-lora train: warning: 1 routers .* cannot learn; use .*"  # in one line, without a place in our source


def test_where_nobody_watches_there_is_a_line_for_every_record(tmp_path, furnished):
    out, err, records = in_a_file("--json", tmp_path, furnished)
    assert json.loads(out)
    warned, *lines = err.splitlines()
    assert re.fullmatch(WARNING, warned)
    assert [r["step"] for r in records] == [0, 1, 3, 3, 6, 6] and len(lines) == len(records)
    for line, record in zip(lines, records, strict=True):
        left = ", 0:00:.. left" if record["step"] == 3 else ""  # nothing is known at first, and left at the end
        if "eval_loss" in record:
            said = f"evaluation loss {record['eval_loss']:.4f}"
        else:
            said = f"loss {record['lm_loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s{left}"
        assert re.fullmatch(f"step {record['step']} of 6: {said}", line), line


def test_quiet_prints_no_lines_but_the_warning(tmp_path, furnished):
    out, err, _ = in_a_file("--quiet", tmp_path, furnished)
    assert out == "" and re.fullmatch(WARNING + r"\n", err)


def test_the_time_left_is_that_of_the_steps_after_the_first_line(monkeypatch, capfd):
    now = iter([100.0, 130.0, 4000.0])
    monkeypatch.setattr(log_lines.time, "monotonic", lambda: next(now))
    told = log_lines.LogLines(Shell(), total_steps=1000)
    for step in (1, 11, 1000):
        told(step, {"lm_loss": 1.0, "tokens_per_second": 12345.6})
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "step 1 of 1000: loss 1.0000, 12,346 tokens/s"
    assert lines[1] == "step 11 of 1000: loss 1.0000, 12,346 tokens/s, 0:49:27 left"  # 989 steps of 3 seconds
    assert lines[2] == "step 1000 of 1000: loss 1.0000, 12,346 tokens/s"


def test_warnings_are_printed_as_before_when_the_verb_has_ended(furnished):
    before = warnings.formatwarning
    assert not cli.main(["layouts", "--quiet"])
    assert warnings.formatwarning is before


@pytest.fixture
def on_a_terminal(every_update_is_drawn, furnished, tmp_path, monkeypatch, capfd):
    """(verb, flag) -> what it prints to stdout, and to a stderr that claims to be a terminal."""
    from moe_lora_interop.cli import push
    from moe_lora_jax.cli import quickstart

    monkeypatch.chdir(furnished)
    for name in ("argv", "path"):  # `run` changes them
        monkeypatch.setattr(sys, name, [*getattr(sys, name)])
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(quickstart, "_has_peft", lambda: False)  # another process: tests/test_verbs_quickstart.py
    monkeypatch.setattr(push, "_uploaded", lambda repo, *_, **__: repo)  # needs a hub: tests/test_hub.py

    def run(verb, flag):
        words = COMMANDS[verb][0].replace("OUT", str(tmp_path / "out")).split()
        assert not cli.main([words[0], flag, *words[1:]])
        return capfd.readouterr()

    return run


@pytest.mark.parametrize("verb", COMMANDS)
def test_quiet(verb, on_a_terminal):
    shown = on_a_terminal(verb, "--quiet")
    asked = COMMANDS[verb][1]
    assert shown.err == ""
    assert asked in shown.out if asked else shown.out == ""


@pytest.mark.parametrize("verb", [verb for verb in COMMANDS if verb != "run"])
def test_json_is_alone_on_stdout_and_progress_is_on_stderr(verb, on_a_terminal):
    shown = on_a_terminal(verb, "--json")
    assert json.loads(shown.out)
    assert [stage for stage in COMMANDS[verb][2] if stage not in shown.err] == []


def test_a_bar_counts_names_stages_and_vanishes(every_update_is_drawn):
    file = io.StringIO()
    with progress("one [bold]stage", Console(file=file, force_terminal=True, width=100)) as bar:
        assert list(tracked([5, 6, 7], bar)) == [5, 6, 7]
        bar(2, 4, "in other words")
        bar.stage("another")
    shown = file.getvalue()
    assert all(text in shown for text in ("one [bold]stage", "3/3", "in other words", "2/4"))
    assert "/" not in shown.split("another")[-1], "how much the next stage is, is not known"
    assert shown.endswith("\x1b[2K"), "the last thing is that the line is erased"


@pytest.mark.parametrize("console", [Console(file=io.StringIO()), Console(force_terminal=True, quiet=True)])
def test_no_bar_where_there_is_no_terminal_or_it_shall_be_quiet(console, capfd):
    with progress("working", console) as bar:
        bar(1, 2)
        bar.stage("more")
    assert capfd.readouterr() == ("", "") and (console.quiet or console.file.getvalue() == "")


def test_progress_comes_after_the_work_on_each():
    said, work = [], []
    for item in tracked("ab", lambda *numbers: said.append(numbers)):
        work.append((item, list(said)))
    assert work == [("a", []), ("b", [(1, 2)])] and said == [(1, 2), (2, 2)]
