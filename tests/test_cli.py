"""The shell: exit codes, JSON, and what a verb must not import."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moe_lora_interop
from moe_lora_interop.cli import main as cli
from tests.adapters import Q0, make_adapter

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "adapter_model.safetensors"


def shell(*args, code=None):
    """Runs `python -m moe_lora_interop.cli.main ARGS`, or `python -c code`."""
    start = ["-m", "moe_lora_interop.cli.main", *map(str, args)] if code is None else ["-c", code, *map(str, args)]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run([sys.executable, *start], capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "[bold]ädapter"
    moe_lora_interop.write(make_adapter(base_model_name_or_path="org/[red]base", top_k=2), path)
    return path


@pytest.fixture
def damaged(tmp_path):
    moe_lora_interop.write(make_adapter(), tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    stored[f"base_model.model.{Q0}.moe_lora_A"][:] = np.nan
    save_file(stored, tmp_path / WEIGHTS)
    return tmp_path


def test_inspect_prints_every_tensor_and_the_base(adapter):
    done = shell("inspect", adapter)
    assert (done.returncode, done.stderr) == (0, "")
    for name, info in moe_lora_interop.inspect(adapter).tensors.items():
        (line,) = [line for line in done.stdout.splitlines() if f" {name} " in line]
        assert info.dtype in line and str(list(info.shape)) in line
    assert "org/[red]base" in done.stdout and "2 largest" in done.stdout
    assert "--max-lora-rank 16, with the plugin" in done.stdout  # 3 experts of rank 2, 3 times 3 rows of a router


def test_inspect_says_why_vllm_cannot_serve_it():
    done = shell("inspect", ROOT / "tests/golden/native/ffn/adapter")
    assert done.returncode == 0
    assert "vLLM  cannot serve it: scope: found ffn" in done.stdout and "--as mixtral" in done.stdout


def test_inspect_json_is_the_inspection(adapter):
    done = shell("inspect", adapter, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == moe_lora_interop.inspect(adapter).to_dict()


def test_verify_of_a_sound_adapter_exits_with_0(adapter):
    done = shell("verify", adapter)
    assert (done.returncode, done.stdout, done.stderr) == (0, "sound\n", "")


def test_verify_of_a_damaged_adapter_exits_with_1(damaged):
    done = shell("verify", damaged)
    assert done.returncode == 1
    assert f"error: {Q0} lora_A: 30 of 30 values" in done.stdout and done.stdout.endswith("NOT sound\n")


def test_verify_json(damaged, adapter):
    found = json.loads(shell("verify", damaged, "--json").stdout)
    assert found["sound"] is False
    assert found["findings"] == [f.__dict__ for f in moe_lora_interop.verify(damaged)]
    done = shell("verify", adapter, "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"sound": True, "findings": []})


def test_verify_against_a_base(adapter, tmp_path):
    save_file({"x.weight": np.zeros((2, 2), "float32")}, tmp_path / "model.safetensors")
    done = shell("verify", adapter, "--base", tmp_path)
    assert done.returncode == 1 and f"{Q0}: not in the base model" in done.stdout


def test_inspect_of_no_checkpoint_exits_with_2_and_no_traceback(tmp_path):
    done = shell("inspect", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("moe-lora inspect: not a checkpoint") and "adapter_config.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("args", [["inspect"], ["inspect", "a", "b"], ["inspect", "a", "--jso"], ["verify", "--base"]])
def test_wrong_use_exits_with_2(args):
    done = shell(*args)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_an_unknown_verb_lists_the_known_ones():
    done = shell("inspekt", "x")
    assert done.returncode == 2
    assert "unknown verb 'inspekt'" in done.stderr and "inspect, " in done.stderr and "verify" in done.stderr


def test_help_lists_the_verbs_and_no_verb_is_wrong_use():
    done = shell("--help")
    assert done.returncode == 0 and "inspect" in done.stdout and "verify" in done.stdout
    assert shell().returncode == 2


def test_the_version_is_that_of_the_package():
    assert shell("--version").stdout == f"moe-lora {moe_lora_interop.__version__}\n"


def test_every_verb_is_listed_with_the_first_line_of_its_own_help():
    ours = {p.name: p.load().__doc__.strip().splitlines()[0] for p in entry_points(group=cli.GROUP)}
    assert cli.SUMMARIES == ours
    listed = shell("--help").stdout
    assert all(re.search(rf"^  {name} +{re.escape(line)}$", listed, re.MULTILINE) for name, line in ours.items())


def test_help_of_a_verb_describes_its_arguments():
    done = shell("inspect", "--help")
    assert done.returncode == 0 and "--json" in done.stdout and "directory" in done.stdout.lower()


def test_the_console_script_is_the_same_program(adapter):
    script = Path(sys.executable).with_name("moe-lora")
    done = subprocess.run([script, "verify", adapter], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "sound\n")


NO_FRAMEWORK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"jax", "jaxlib", "flax", "torch", "transformers", "peft", "optax"}:
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Block())
from moe_lora_interop.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_inspect_and_verify_need_no_framework(adapter, verb):
    done = shell(verb, adapter, code=NO_FRAMEWORK)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_block_on_frameworks_works():
    done = shell(code=NO_FRAMEWORK.replace("from moe_lora_interop.cli.main import main", "import jax"))
    assert done.returncode == 1 and "jax was imported" in done.stderr


def test_a_reader_that_stops_early_gets_no_traceback(adapter):
    command = f'"{sys.executable}" -m moe_lora_interop.cli.main inspect "{adapter}" --json | head -c 1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("{", "")


# --- in this process: verbs of other packages -----------------------------------------------------------------------


class Verb:
    """An entry point: loading it gives a function, or raises."""

    def __init__(self, name, verb):
        self.name, self.verb, self.extras = name, verb, ["some", "extra"]

    def load(self):
        if isinstance(self.verb, BaseException):
            raise self.verb
        return self.verb


def run(monkeypatch, verb, *args):
    monkeypatch.setattr(cli, "entry_points", lambda group: [Verb("other", verb)])
    return cli.main(["other", *args])


def test_a_verb_whose_package_is_missing_says_what_to_install(monkeypatch, capsys):
    assert run(monkeypatch, ModuleNotFoundError("No module named 'jax'", name="jax")) == 2
    error = capsys.readouterr().err
    assert error == "moe-lora other needs the package 'jax': pip install 'moe-lora-jax[some,extra]'\n"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (3, 3)])
def test_the_exit_code_is_what_the_verb_returns(monkeypatch, returned, code):
    def verb(number: int) -> int | None:
        assert number == 5
        return returned

    assert run(monkeypatch, verb, "--number", "5") == code


@pytest.mark.parametrize(
    "error", [moe_lora_interop.CheckpointError("bad", ["a: b"]), moe_lora_interop.ConfigError("bad", ["a: b"])]
)
def test_errors_about_data_exit_with_2(monkeypatch, capsys, error):
    def verb() -> int:
        raise error

    assert run(monkeypatch, verb) == 2
    assert "moe-lora other: bad:\n  - a: b" in capsys.readouterr().err


def test_an_interrupt_exits_with_130(monkeypatch):
    def verb() -> int:
        raise KeyboardInterrupt

    assert run(monkeypatch, verb) == 130


def test_a_bug_is_not_hidden(monkeypatch):
    def verb() -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError):
        run(monkeypatch, verb)
