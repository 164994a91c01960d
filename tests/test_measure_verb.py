"""`moe-lora measure`: mean gates for `moe-lora export`, and what an export costs against the full mixture."""

import json

import numpy as np
import pytest
import tyro
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

import moe_lora_interop
import moe_lora_jax as mlj
from moe_lora_interop.cli.export import export
from moe_lora_interop.export.plain_lora import read_plain_lora
from moe_lora_jax.cli.measure import measure
from moe_lora_jax.train.data import read_data
from moe_lora_jax.train.tokenizer import load_tokenizer
from tests.hf import make_model, save_model

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


def run(verb, *args):
    tyro.cli(verb, args=list(map(str, args)))


def on_data(made, kind):
    """The arguments that say what is measured on what."""
    return [made / kind, "--base", made / "base", "--data", made / "data.jsonl"]


@pytest.mark.parametrize("kind", ["linear", "model"])
def test_mean_gates_are_the_averages_over_real_tokens(made, kind, tmp_path, capsys):
    means = tmp_path / "new" / "means.json"
    run(measure, *on_data(made, kind), "--mean-gates", means)
    assert capsys.readouterr().out == f"{means}: mean gates on {made / 'data.jsonl'}\n"
    run(export, made / kind, tmp_path / "out", "--as", "lora", "--gates", means)
    assert f"every token gets the same gates (from {means})" in capsys.readouterr().out

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
    run(export, made / "ffn", tmp_path / "out", "--as", "lora-experts", "--quiet")
    run(measure, *on_data(made, "ffn"), "--exported", tmp_path / "out")
    shown = capsys.readouterr().out
    rows = report_rows(shown)
    assert list(rows) == ["base without adapter", "expert_0", "expert_1", "expert_2"]
    assert shown.split("against")[1] in (tmp_path / "out" / "README.md").read_text() + "\n"

    full = mlj.load_adapter(mlj.load_base_model(made / "base"), made / "ffn")
    other = mlj.load_adapter(mlj.load_base_model(made / "base"), tmp_path / "out" / "expert_1", layout="lora")
    kl, same = [], []
    for example in read_data(made / "data.jsonl", load_tokenizer(made / "base"), max_length=512).examples:
        p, q = (np.asarray(forward(m, example.ids[None])[0], np.float64) for m in (full, other))
        log_p, log_q = (z - np.log(np.exp(z).sum(axis=-1, keepdims=True)) for z in (p, q))
        kl += (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).tolist()
        same += (p.argmax(axis=-1) == q.argmax(axis=-1)).tolist()
    assert rows["expert_1"] == (pytest.approx(np.mean(kl), abs=2e-6), pytest.approx(np.mean(same), abs=1e-4))
    assert np.mean(kl) > 1e-5


def test_an_exact_export_costs_nothing(made, tmp_path, capsys):
    for number, task in enumerate([["2"], ["1", "2"]]):
        run(export, made / "task", tmp_path / str(number), "--as", "lora", "--task", *task, "--quiet")
        compared = ["--exported", tmp_path / str(number), "--task", *task, "--max-length", 16]
        run(measure, *on_data(made, "task"), *compared)
        rows = report_rows(capsys.readouterr().out)
        assert rows[str(number)] == (0.0, 1.0)
        assert rows["base without adapter"][0] > 1e-5


def test_experts_are_listed_in_the_order_of_their_numbers_whatever_else_is_there(made, tmp_path, capsys):
    run(export, made / "linear", tmp_path / "out", "--as", "lora-experts", "--quiet")
    (tmp_path / "out" / "expert_0").rename(tmp_path / "out" / "expert_10")
    (tmp_path / "out" / "expert_1").rename(tmp_path / "out" / "expert_of_law")
    run(measure, *on_data(made, "linear"), "--exported", tmp_path / "out", "--json")
    found = json.loads(capsys.readouterr().out)
    assert list(found["measured"]["models"]) == ["base without adapter", "expert_2", "expert_10", "expert_of_law"]
    assert (found["source"], found["mean_gates"]) == (str(made / "linear"), None)


@pytest.mark.parametrize(
    ("args", "problems"),
    [
        ([], ["mean_gates, exported: expected --mean-gates FILE.json, --exported DIR or both"]),
        (["--task", "1"], ["mean_gates, exported: expected", "task: found without --exported"]),
        (["--mean-gates", "used.json", "--exported", "no"], ["mean_gates: found used.json", "exported: found no no/"]),
    ],
)
def test_wrong_arguments(args, problems, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used.json").write_text("[1, 0]")
    with pytest.raises(moe_lora_interop.ConfigError) as error:
        run(measure, "adapter", "--base", "base", "--data", "data", *args)
    assert len(error.value.problems) == len(problems)
    assert all(p.startswith(start) for p, start in zip(error.value.problems, problems, strict=True))
    assert (tmp_path / "used.json").read_text() == "[1, 0]"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("task", "gates: this adapter routes by task, expected --task ID of `moe-lora export`"),
        ("ffn", "gates: found mean in scope ffn, where only one expert alone is a LoRA; expected a FILE.json"),
    ],
)
def test_mean_gates_that_no_lora_can_have(made, kind, reason, tmp_path):
    with pytest.raises(moe_lora_interop.ConfigError, match=reason):
        run(measure, *on_data(made, kind), "--mean-gates", tmp_path / "means.json")
    assert not (tmp_path / "means.json").exists()


@pytest.mark.parametrize(
    ("kind", "task", "reason"),
    [
        ("task", [], "task: found no id"),
        ("task", ["--task", "3"], "task: found 3, expected an id from 0 to 2"),
        ("linear", ["--task", "1"], "the gates depend on the input"),
    ],
)
def test_tasks_that_the_mixture_does_not_have(made, kind, task, reason, tmp_path):
    (tmp_path / "README.md").write_text("as it was")
    with pytest.raises(moe_lora_interop.ConfigError, match=reason):
        run(measure, *on_data(made, kind), "--exported", tmp_path, *task)
    assert (tmp_path / "README.md").read_text() == "as it was"
