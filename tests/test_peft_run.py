"""`moe-lora run`: scripts that never import us know MOE_LORA; and the examples, which are such scripts."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from text_models import SENTENCES, write_base

from moe_lora_interop import peft_run
from moe_lora_interop.cli.shell import Shell
from moe_lora_interop.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import json, sys
import helper                                   # beside the script, as Python would find it
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
print(json.dumps({"argv": sys.argv[1:], "name": __name__, "known": "MOE_LORA" in PEFT_TYPE_TO_CONFIG_MAPPING}))
sys.exit(helper.CODE)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "helper.py").write_text("CODE = 7\n")
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path / "train.py"


def python(*words: str, cwd: Path = ROOT, code: int = 0) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.mark.parametrize(
    "words",
    [
        ["{script}"],
        ["python", "{script}"],
        ["--", "python3.11", "{script}"],
        ["-m", "train"],
        ["python", "-m", "train"],
    ],
    ids=" ".join,
)
def test_a_script_that_never_imports_us(script, words):
    words = [word.format(script=script) for word in words]
    done = python("-m", "moe_lora_interop.peft_run", *words, "--lr", "1e-4", "--", "-x", cwd=script.parent, code=7)
    assert json.loads(done.stdout) == {"argv": ["--lr", "1e-4", "--", "-x"], "name": "__main__", "known": True}


def test_without_it_the_method_is_unknown(script):
    assert json.loads(python(str(script), code=7).stdout)["known"] is False


def test_an_installed_program(script, tmp_path, monkeypatch):
    program = tmp_path / "finetune"
    program.write_text(f"#!{sys.executable}\n{SCRIPT}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    done = python("-m", "moe_lora_interop.peft_run", "finetune", "sft", code=7)
    assert json.loads(done.stdout) == {"argv": ["sft"], "name": "__main__", "known": True}


def test_an_error_of_the_script_is_its_own(tmp_path):
    (tmp_path / "train.py").write_text("raise RuntimeError('no data')\n")
    done = python("-m", "moe_lora_interop.peft_run", str(tmp_path / "train.py"), code=1)
    assert "train.py" in done.stderr and "RuntimeError: no data" in done.stderr


def test_the_verb_takes_what_follows_two_dashes(monkeypatch):
    seen = []
    monkeypatch.setattr(peft_run, "execute", lambda command, shell: seen.append(command) or 0)
    assert tyro.cli(peft_run.run, args=["--", "python", "train.py", "--lr", "1", "--", "--help"]) == 0
    assert seen == [("python", "train.py", "--lr", "1", "--", "--help")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to run"),
        (["python"], "nothing to run"),
        (["python", "-u", "train.py"], "options of Python itself cannot be passed on:\n  - found '-u'"),
        (["-m"], "-m without a module"),
        (["python", "no_such.py"], "'no_such.py': no such file or program"),
        (["accelerate", "launch", "train.py"], r"accelerate \.\.\. -m moe_lora_interop.peft_run SCRIPT"),
        (
            ["-m", "torch.distributed.run", "train.py"],
            r"torch.distributed.run \.\.\. -m moe_lora_interop.peft_run SCRIPT",
        ),
        (["ls"], "not a Python program"),
    ],
    ids=str,
)
def test_refusals(words, message):
    with pytest.raises(ConfigError, match=message):
        peft_run.execute(words, Shell())


def test_importing_the_verb_needs_no_torch():
    code = "import sys, moe_lora_interop.peft_run; print({'torch', 'peft', 'transformers'} & set(sys.modules))"
    assert python("-c", code).stdout.strip() == "set()"


@pytest.mark.parametrize("example", ["trainer.py", "trl_sft.py"])
def test_examples(tmp_path, example):
    if example.startswith("trl") and importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed: pip install -c constraints.txt 'moe-lora-jax[test]'")
    write_base(tmp_path / "base")
    (tmp_path / "lines.txt").write_text("\n".join(SENTENCES))
    paths = {"base": "base", "data": "lines.txt", "output": "adapter"}
    options = [word for name, path in paths.items() for word in (f"--{name}", str(tmp_path / path))]
    assert "moe_lora_interop" not in (ROOT / "examples" / example).read_text().split('"""')[2]
    done = python("-m", "moe_lora_interop.peft_run", str(ROOT / "examples" / example), *options, "--steps", "10")
    first, last = done.stdout.strip().splitlines()[-1].removeprefix("loss ").split(" -> ")
    assert float(last) < float(first) - 0.1
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "MOE_LORA"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 10_000
