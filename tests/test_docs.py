"""The code blocks of README.md, the pages in docs/ and CONTRIBUTING.md are run, in order, as a reader would."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from moe_lora_interop.cli import main as cli
from moe_lora_interop.config import routings
from moe_lora_interop.dialects import registry
from tests.tiny_training import small_dirs  # noqa: F401  a fixture

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "README.zh-CN.md",
    "CONTRIBUTING.md",
    *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
]
SCRIPT = "from peft import AutoPeftModelForCausalLM; AutoPeftModelForCausalLM.from_pretrained('out')"


def shell(example):
    """Runs every `moe-lora ...` line; other commands set a machine up, and `make` targets must exist."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        command = shlex.split(line, comments=True)
        if command[:1] == ["moe-lora"]:
            if command[1] == "run":  # sets up and replaces a process
                subprocess.run([sys.executable, "-m", "moe_lora_interop.cli.main", *command[1:]], check=True)
            else:
                assert not cli.main(command[1:]), line
        elif command[:1] == ["make"]:
            assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        else:
            assert not command or command[:2] == ["pip", "install"], f"not known how to run: {line}"


@pytest.fixture(scope="module")
def furnished(tmp_path_factory, small_dirs):  # noqa: F811
    """A directory that has what the pages speak of: base, data.jsonl, out, another project's adapter, a script."""
    made = tmp_path_factory.mktemp("reader")
    shutil.copytree(small_dirs["base"], made / "base")
    shutil.copy(small_dirs["data"], made / "data.jsonl")
    shutil.copytree(ROOT / "tests/peers/loramoe/adapter", made / "loramoe_adapter")
    (made / "script.py").write_text(SCRIPT)
    sizes = ["--num-experts", "4", "--top-k", "2", "--steps", "1"]
    data = ["--model", str(made / "base"), "--data", str(made / "data.jsonl"), "--output-dir", str(made / "out")]
    assert not cli.main(["train", *data, *sizes])
    return made


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of(page, furnished, tmp_path, monkeypatch):
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    if page == "docs/index.md":
        shutil.rmtree(tmp_path / "out")  # it makes its own
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(routings, "_registered", {})
    parsers = [PythonCodeBlockParser(), *(CodeBlockParser(name, shell) for name in ("bash", "shell"))]
    for example in Sybil(parsers=parsers, path=str(ROOT)).parse(ROOT / page).examples():
        example.evaluate()


# what people type, and the page that must be among those found
SEARCHED = {
    "packing": "your-data",
    "multi-turn": "your-data",
    "Colab": "cookbook",
    "Kaggle": "cookbook",
    "Slurm": "cookbook",
    "wandb": "cookbook",
    "vLLM": "serve",
    "sequence length": "long-sequences",
    "Qwen3-MoE": "faq",
    "OOM": "when-something-is-wrong",
    "learning rate": "pick-a-mixture",
}


def build_site(config: Path, to: Path):
    # without --quiet, with which MkDocs counts no warnings, and a broken link would pass
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(to)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )


def test_the_site_builds_without_a_broken_link_and_is_found_by_searching(tmp_path):
    done = build_site(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "moe-lora train" in (tmp_path / "commands.html").read_text()
    assert "MoeLoraLinear" in (tmp_path / "api/moe_lora_jax.html").read_text()
    assert "wrap.css" in (tmp_path / "index.html").read_text()
    index = json.loads((tmp_path / "search/search_index.json").read_text())["docs"]
    missing = [
        f"{words}: {page}"
        for words, page in SEARCHED.items()
        if not any(
            words.lower() in f"{d['title']} {d['text']}".lower() for d in index if d["location"].startswith(page)
        )
    ]
    assert not missing


def test_a_broken_link_is_noticed(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("[nowhere](nowhere.md)")
    (tmp_path / "mkdocs.yml").write_text("site_name: small\nstrict: true\n")
    done = build_site(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0 and "nowhere.md" in done.stderr
