"""`moe-lora export`: arguments, mean gates, and what the export costs against the full mixture."""

import json

import numpy as np
import pytest
import tyro
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

import moe_lora_interop
import moe_lora_jax as mlj
from moe_lora_interop.export.plain_lora import read_plain_lora
from moe_lora_jax.cli.export import export
from moe_lora_jax.train.data import read_data
from moe_lora_jax.train.tokenizer import load_tokenizer
from tests.hf import make_model, save_model
from tests.peers_data import Peer

WORDS = [f"w{n}" for n in range(60)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A one-layer base with a tokenizer, a data file of two lengths, and random adapters of four kinds."""
    root = tmp_path_factory.mktemp("made")
    save_model(make_model("llama", num_hidden_layers=1), root / "base")
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(root / "base" / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (root / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, length)) for length in (4, 9, 9, 4, 9)]
    (root / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    for name, fields in {
        "linear": {"routed_scaling_factor": 1.5},
        "model": {"scope": "model", "router_bias": True},
        "ffn": {"scope": "ffn", "target_modules": ["gate_proj", "up_proj", "down_proj"]},
        "task": {"scope": "model", "router_input": "task", "num_tasks": 3, "task_embedding_dim": 4, "top_k": None},
    }.items():
        settings = {"r": 2, "num_experts": 3, "top_k": 2, "target_modules": ["q_proj", "down_proj"]}
        model = mlj.load_base_model(root / "base")
        config = mlj.MoeLoraConfig(**{**settings, "init_lora_weights": False, **fields})
        mlj.save_pretrained(mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(0)), root / name)
    return root


def run(*args):
    tyro.cli(export, args=list(map(str, args)))


@pytest.mark.parametrize("kind", ["linear", "model"])
def test_mean_gates_are_the_averages_over_real_tokens(made, kind, tmp_path, capsys):
    measured = ["--base", made / "base", "--data", made / "data.jsonl"]
    run(made / kind, tmp_path / "out", "--as", "lora", "--gates", "mean", *measured)
    shown = capsys.readouterr().out
    assert "every token gets the same gates (means on" in shown and "against the full mixture" in shown

    adapter = moe_lora_interop.read(made / kind)
    model = mlj.load_adapter(mlj.load_base_model(made / "base"), adapter)
    examples = read_data(made / "data.jsonl", load_tokenizer(made / "base"), max_length=512).examples
    assert len({len(e.ids) for e in examples}) > 1  # some are padded in a batch
    gates = {}
    for example in examples:  # alone, so without padding
        router = route(model, example.ids[None])
        for name, output in router.items():
            gates.setdefault(name, []).append(np.asarray(output.gates[0], np.float64))
    exported = read_plain_lora(tmp_path / "out")
    for module in adapter.modules:
        mean = np.concatenate(gates[module if kind == "linear" else "model"]).mean(axis=0)
        mean = adapter.config.routed_scaling_factor * mean
        sizes = adapter.config.for_module(module)
        expected = [g * s * b for g, s, b in zip(mean, sizes.scalings, adapter.tensors[module, "lora_B"], strict=True)]
        found = exported.tensors[module, "lora_B"][0]
        np.testing.assert_allclose(found, np.concatenate(expected, axis=1), rtol=1e-4, atol=1e-6)


@nnx.jit
def route(model, ids):
    return model(ids, return_router=True)[1]


@nnx.jit
def forward(model, ids):
    return model(ids)


def report_rows(text):
    """{name: (KL, top-1 agreement)} of a printed report."""
    lines = [line.rsplit(maxsplit=2) for line in text.splitlines() if line.endswith("%")]
    return {name.strip(): (float(kl), float(top1.rstrip("%")) / 100) for name, kl, top1 in lines}


def test_the_report_compares_next_token_distributions(made, tmp_path, capsys):
    measured = ["--base", made / "base", "--data", made / "data.jsonl"]
    run(made / "ffn", tmp_path / "out", "--as", "lora-experts", *measured)
    shown = capsys.readouterr().out
    rows = report_rows(shown)
    assert list(rows) == ["base without adapter", "expert_0", "expert_1", "expert_2"]
    assert shown.split("against")[1] in (tmp_path / "out" / "README.md").read_text() + "\n"

    full = mlj.load_adapter(mlj.load_base_model(made / "base"), made / "ffn")
    other = mlj.load_adapter(mlj.load_base_model(made / "base"), tmp_path / "out" / "expert_1", dialect="lora")
    kl, same = [], []
    for example in read_data(made / "data.jsonl", load_tokenizer(made / "base"), max_length=512).examples:
        p, q = (np.asarray(forward(m, example.ids[None])[0], np.float64) for m in (full, other))
        log_p, log_q = (z - np.log(np.exp(z).sum(axis=-1, keepdims=True)) for z in (p, q))
        kl += (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).tolist()
        same += (p.argmax(axis=-1) == q.argmax(axis=-1)).tolist()
    assert rows["expert_1"] == (pytest.approx(np.mean(kl), abs=2e-6), pytest.approx(np.mean(same), abs=1e-4))
    assert np.mean(kl) > 1e-5


def test_an_exact_export_costs_nothing(made, tmp_path, capsys):
    measured = ["--base", made / "base", "--data", made / "data.jsonl", "--max-length", 16]
    for number, task in enumerate([["2"], ["1", "2"]]):
        run(made / "task", tmp_path / str(number), "--as", "lora", "--task", *task, *measured)
        rows = report_rows(capsys.readouterr().out)
        assert rows[str(number)] == (0.0, 1.0)
        assert rows["base without adapter"][0] > 1e-5


def test_a_mixtral_by_the_verb(made, tmp_path, capsys):
    run(made / "ffn", tmp_path / "out", "--as", "mixtral", "--base", made / "base", "--dtype", "bfloat16")
    assert "rounded to bfloat16" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts_per_tok"] == 2
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (made / "base" / "tokenizer.json").read_bytes()


def test_a_foreign_layout_with_options(tmp_path, capsys):
    peer = Peer("mola/adapter")
    top_k = json.dumps(peer.options["top_k"])
    run(peer.directory, tmp_path / "out", "--as", "lora", "--gates", "uniform", "--option", f"top_k={top_k}")
    assert "exported as lora" in capsys.readouterr().out
    run(peer.directory, tmp_path / "two", "--as", "lora-experts", "--from", "mola", "--option", f"top_k={top_k}")


@pytest.mark.parametrize(
    ("args", "problems"),
    [
        (["--as", "lora"], ["gates, task: expected one of"]),
        (["--as", "lora", "--gates", "uniform", "--task", "1"], ["gates, task: expected one of"]),
        (["--as", "lora", "--gates", "mean"], ["data: missing"]),
        (["--as", "lora", "--gates", "mean", "--data", "x"], ["base: missing"]),
        (["--as", "mixtral"], ["base: missing"]),
        (["--as", "mixtral", "--gates", "mean"], ["gates: found with --as mixtral", "base: missing", "data: missing"]),
        (["--as", "lora-experts", "--task", "1"], ["task: found with --as lora-experts, expected only with lora"]),
        (["--as", "lora-experts", "--dtype", "float32"], ["dtype: found with --as lora-experts"]),
    ],
)
def test_wrong_arguments(args, problems, tmp_path):
    with pytest.raises(moe_lora_interop.ConfigError) as error:
        run(tmp_path / "no", tmp_path / "out", *args)
    assert len(error.value.problems) == len(problems)
    assert all(p.startswith(start) for p, start in zip(error.value.problems, problems, strict=True))


@pytest.mark.parametrize(
    ("kind", "args", "reason"),
    [
        ("task", ["--gates", "mean"], "this adapter routes by task, expected --task"),
        ("ffn", ["--gates", "mean"], "found mean in scope ffn"),
        ("ffn", ["--gates", "uniform"], "the activation stands between"),
        ("linear", ["--task", "1"], "the gates depend on the input"),
    ],
)
def test_gates_that_do_not_fit(made, kind, args, reason, tmp_path):
    measured = ["--base", made / "base", "--data", made / "data.jsonl"]
    with pytest.raises(moe_lora_interop.ConfigError, match=reason):
        run(made / kind, tmp_path / "out", "--as", "lora", *args, *measured)
    assert not (tmp_path / "out").exists()
