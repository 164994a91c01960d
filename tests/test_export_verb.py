"""`moe-lora export`: its arguments. (What the forms compute: test_export_lora, test_export_mixtral.)"""

import json
import shutil

import numpy as np
import pytest
import tyro
from safetensors.numpy import load_file, save_file

import moe_lora_interop
from moe_lora_interop.cli.export import export
from moe_lora_interop.export.plain_lora import read_plain_lora
from tests.adapters import SHAPES, assert_same_tensors, make_adapter
from tests.export_truth import deltas_of
from tests.peers_data import ROOT, Peer


def run(*args):
    tyro.cli(export, args=list(map(str, args)))


@pytest.mark.parametrize("gates", [[0.5, 0.125, 0.375], "uniform"])
def test_a_lora_with_these_gates(gates, tmp_path, capsys):
    adapter = make_adapter()
    moe_lora_interop.write(adapter, tmp_path / "mixture")
    file = tmp_path / "gates.json"
    file.write_text(json.dumps(gates))
    run(tmp_path / "mixture", tmp_path / "out", "--as", "lora", "--gates", gates if gates == "uniform" else file)
    source = "uniform" if gates == "uniform" else f"from {file}"
    assert f"every token gets the same gates ({source})" in capsys.readouterr().out
    exported = read_plain_lora(tmp_path / "out")
    for module, delta in deltas_of(adapter, lambda *_: [1 / 3] * 3 if gates == "uniform" else gates).items():
        a, b = (exported.tensors[module, role][0].astype(np.float64) for role in ("lora_A", "lora_B"))
        np.testing.assert_allclose(b @ a, delta, rtol=1e-5, atol=1e-6)


def test_a_mixtral(tmp_path, capsys):
    base = shutil.copytree(ROOT / "bases" / "gqa", tmp_path / "base")
    (base / "tokenizer.json").write_text("a tokenizer")
    peer = Peer("moe_peft/mixlora")
    run(peer.directory, tmp_path / "out", "--as", "mixtral", "--base", base, "--dtype", "bfloat16")
    assert "rounded to bfloat16" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts_per_tok"] == moe_lora_interop.read(peer.directory).config.top_k
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "a tokenizer"


def test_a_foreign_layout_with_options(tmp_path, capsys):
    peer = Peer("mola/adapter")
    top_k = json.dumps(peer.options["top_k"])
    run(peer.directory, tmp_path / "out", "--as", "lora", "--gates", "uniform", "--option", f"top_k={top_k}")
    assert "exported as lora" in capsys.readouterr().out
    run(peer.directory, tmp_path / "two", "--as", "lora-experts", "--from", "mola", "--option", f"top_k={top_k}")


@pytest.mark.parametrize("form", [["lora", "--gates", "uniform"], ["lora-experts"]], ids=lambda form: form[0])
def test_a_lora_for_a_model_with_the_text_model_inside(form, tmp_path):
    adapter = make_adapter()
    moe_lora_interop.write(adapter, tmp_path / "mixture")
    (tmp_path / "whole").mkdir()
    weights = {f"language_model.{m}.weight": np.zeros((n_out, n_in), "float32") for m, (n_in, n_out) in SHAPES.items()}
    save_file(weights, tmp_path / "whole" / "model.safetensors")
    args = ["--as", *form, "--base", tmp_path / "whole", "--prefix"]
    run(tmp_path / "mixture", tmp_path / "out", *args, "language_model.")
    run(tmp_path / "mixture", tmp_path / "alone", "--as", *form)
    for file in (tmp_path / "alone").rglob("adapter_model.safetensors"):
        placed = load_file(tmp_path / "out" / file.relative_to(tmp_path / "alone"))
        alone = load_file(file)
        named = {
            name.replace("base_model.model.", "base_model.model.language_model.", 1): value
            for name, value in alone.items()
        }
        assert_same_tensors(placed, named)
        assert {n.removeprefix("base_model.model.").rsplit(".", 2)[0] + ".weight" for n in placed} == weights.keys()
    with pytest.raises(moe_lora_interop.CheckpointError) as error:
        run(tmp_path / "mixture", tmp_path / "wrong", *args, "text.")
    assert sorted(error.value.problems) == [
        f"text.{m}: not in the base model at {tmp_path / 'whole'}" for m in sorted(SHAPES)
    ]
    assert not (tmp_path / "wrong").exists()


NO_MEAN = (
    "gates: found mean, expected uniform or a FILE.json; "
    "`moe-lora measure SOURCE --base BASE --data DATA --mean-gates FILE.json` writes the means"
)


@pytest.mark.parametrize(
    ("args", "problems"),
    [
        (["--as", "lora"], ["gates, task: expected one of"]),
        (["--as", "lora", "--gates", "uniform", "--task", "1"], ["gates, task: expected one of"]),
        (["--as", "lora", "--gates", "mean"], [NO_MEAN]),
        (["--as", "lora", "--gates", "mean", "--base", "x"], ["base: found with --as lora, expected only", NO_MEAN]),
        (["--as", "mixtral"], ["base: missing"]),
        (["--as", "mixtral", "--gates", "mean"], ["gates: found with --as mixtral", "base: missing"]),
        (["--as", "lora-experts", "--task", "1"], ["task: found with --as lora-experts, expected only with lora"]),
        (["--as", "lora-experts", "--prefix", "x."], ["base: missing"]),
        (["--as", "mixtral", "--prefix", "x.", "--base", "x"], ["prefix: found with --as mixtral"]),
        (["--as", "lora-experts", "--dtype", "float32"], ["dtype: found with --as lora-experts"]),
    ],
)
def test_wrong_arguments(args, problems, tmp_path):
    with pytest.raises(moe_lora_interop.ConfigError) as error:
        run(tmp_path / "no", tmp_path / "out", *args)
    assert len(error.value.problems) == len(problems)
    assert all(p.startswith(start) for p, start in zip(error.value.problems, problems, strict=True))


@pytest.mark.parametrize(
    ("peer", "args", "reason"),
    [
        ("moe_peft/mixlora", ["--gates", "uniform"], "the activation stands between"),
        ("moe_peft/loramoe", ["--task", "1"], "the gates depend on the input"),
    ],
)
def test_gates_that_do_not_fit(peer, args, reason, tmp_path):
    with pytest.raises(moe_lora_interop.ConfigError, match=reason):
        run(Peer(peer).directory, tmp_path / "out", "--as", "lora", *args)
    assert not (tmp_path / "out").exists()
