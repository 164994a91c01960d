"""`moe-lora quickstart` on a smaller scale; its full size is `make quickstart`."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny_training import compiled_once, small_dirs  # noqa: F401

import moe_lora_interop
from moe_lora_interop.cli.shell import Shell
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_jax.cli import quickstart as module
from moe_lora_jax.cli.quickstart import quickstart
from moe_lora_jax.demo import base_and_data
from moe_lora_jax.measure.router_statistics import topic_information
from moe_lora_jax.models import load_base_model
from moe_lora_jax.train.data import Example

pytestmark = pytest.mark.usefixtures("compiled_once", "small_dirs")


@pytest.fixture
def small(monkeypatch):
    for name, value in (("PRETRAINING_STEPS", 3), ("QUESTIONS_PER_TOPIC", 20), ("SENTENCES_PER_TOPIC", 20)):
        monkeypatch.setattr(base_and_data, name, value)


def test_the_whole_way(small, tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    quickstart(out, steps=6)
    printed = capsys.readouterr().out
    loss = printed.split("loss on held-out examples: ")[1].split()
    assert float(loss[2]) < float(loss[0])
    for topic in ("arithmetic", "cooking", "weather", "code", "expert 3"):
        assert topic in printed
    difference = float(printed.split("largest logit difference ")[-1].split()[0])
    assert difference < 1e-4
    assert moe_lora_interop.detect(out / "adapter") == "native"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (out / "base").iterdir()}
    line = json.loads((out / "data" / "topics.jsonl").read_text().splitlines()[0])
    assert set(line) == {"topic", "prompt", "completion"}
    module._claim(out)  # what it made, it may make again
    assert not (out / "adapter").exists()


def test_your_own_model_and_data_and_no_torch(small, small_dirs, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(module, "_has_peft", lambda: False)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the soup is hot {i}"}) + "\n" for i in range(12)))
    quickstart(tmp_path / "out", model=small_dirs["base"], data=text, steps=2, num_experts=3)
    printed = capsys.readouterr().out
    assert "all" in printed and "topics apart" not in printed
    assert "to load it in PyTorch: pip install 'moe-lora-jax[torch]'" in printed
    assert not (tmp_path / "out" / "base").exists()


def test_an_adapter_that_peft_cannot_load_is_an_error(small_dirs, tmp_path, monkeypatch):  # noqa: F811
    def fail(command, **options):
        assert command[0] == sys.executable and command[2].endswith("peft_check.py")
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nKeyError: 'MOE_LORA'\n")

    monkeypatch.setattr(module, "_has_peft", lambda: True)
    monkeypatch.setattr(module.subprocess, "run", fail)
    examples = [Example(np.array([1, 5, 6], np.int32), np.ones(3, bool), 1)]
    model = load_base_model(small_dirs["base"])
    with pytest.raises(CheckpointError, match="PEFT could not load the adapter") as caught:
        module._compare_with_peft(model, small_dirs["base"], tmp_path, examples, 0, Shell())
    assert caught.value.problems == ("KeyError: 'MOE_LORA'",)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ConfigError, match="model and data: found one"):
        quickstart(tmp_path / "out", model=tmp_path)
    with pytest.raises(ConfigError, match="num_experts: found 1"):
        quickstart(tmp_path / "out", num_experts=1)
    with pytest.raises(ConfigError, match="top_k: found 9"):
        quickstart(tmp_path / "out", top_k=9)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match="not empty and not from quickstart"):
        quickstart(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_topic_information_is_mutual_information_in_bits():
    assert topic_information(np.full((3, 4), 0.25)) == pytest.approx(0)
    assert topic_information(np.eye(4)) == pytest.approx(2)
    shares = np.random.default_rng(0).dirichlet(np.ones(4), size=3)
    joint = shares / 3
    expected = np.sum(joint * np.log2(joint / (joint.sum(0) * joint.sum(1, keepdims=True))))
    assert topic_information(shares) == pytest.approx(expected)
