"""The mistakes of a first hour: each is answered with its cause and the next step, never with a traceback."""

import json
import shutil

import pytest

from moe_lora_interop.cli import main as cli
from moe_lora_jax.demo import small_base
from moe_lora_jax.demo.topics import sentences
from tests.tiny_training import small_dirs  # noqa: F401  a fixture

TRAIN = "train --model base --data data.jsonl --output-dir new --steps 1"

# command, exit code, what the answer must say
MISTAKES = {
    "a verb is misspelt": ("trian", 2, ["unknown verb 'trian'", "did you mean train?"]),
    "an option is misspelt": (TRAIN.replace("--steps", "--step"), 2, ["Unrecognized options: --step", "--steps"]),
    "a required option is missing": ("train --model base", 2, ["Missing", "--data PATH", "--output-dir PATH"]),
    "the adapter is not there": ("inspect nowhere", 2, ["nowhere: found nothing, expected a directory"]),
    "a file instead of the directory": ("inspect data.jsonl", 2, ["data.jsonl: found a file, expected a directory"]),
    "the model instead of the adapter": (
        "inspect base",
        2,
        ["base: missing file, expected one of adapter_model", "base is a model's directory, expected an adapter's"],
    ),
    "the folder around the adapter": ("inspect .", 2, ["adapters are in its folders ", "trained", "one of these"]),
    "the adapter instead of the model": (
        "generate --model trained --adapter trained --prompt hi",
        2,
        ["trained is an adapter's directory, expected a model's"],
    ),
    "an id of the Hub, offline": (
        TRAIN.replace("base", "meta-llama/Llama-3.1-8B"),
        2,
        ["cannot find meta-llama/Llama-3.1-8B", "found no such directory", "HF_HUB_OFFLINE"],
    ),
    "no tokenizer": (TRAIN.replace("base", "no_tokenizer"), 2, ["no tokenizer in no_tokenizer", "tokenizer.json"]),
    "a model of another kind": (TRAIN.replace("base", "gpt2"), 2, ["GPT2LMHead", "expected one of Cohere2", "PEFT"]),
    "a quantised model": (TRAIN.replace("base", "quantised"), 2, ["quantization_config", "bitsandbytes"]),
    "the data file is not there": (TRAIN.replace("data.", "nodata."), 2, ["nodata.jsonl: No such file"]),
    "the data file is empty": (TRAIN.replace("data.", "empty."), 2, ["no examples", "prompt and completion"]),
    "lines with other keys": (TRAIN.replace("data.", "keys."), 2, ["keys.jsonl:1: found answer, question"]),
    "a line that is not JSON": (TRAIN.replace("data.", "broken."), 2, ["broken.jsonl:2: not JSON"]),
    "every example is too long": (f"{TRAIN} --max-length 3", 2, ["no example has a token with loss"]),
    "a target is misspelt": (f"{TRAIN} --target-modules q_porj", 2, ["'q_porj'", "did you mean q_proj", "up_proj"]),
    "more experts kept than there are": (
        f"{TRAIN} --num-experts 2 --top-k 4",
        2,
        ["top_k: found 4, expected at most num_experts = 2"],
    ),
    "the output directory has a run": (
        TRAIN.replace("new", "trained"),
        2,
        ["already holds a run; resume it (--resume), or choose another output_dir"],
    ),
    "resumed with other settings": (
        TRAIN.replace("new", "trained").replace("--steps 1", "--steps 1 --seed 5 --resume"),
        2,
        ["settings.seed: found 5, the run has 0", "start a new one with init_adapter"],
    ),
    "another base model": (
        "generate --model wider --adapter trained --prompt hi",
        2,
        ["the adapter is for another base model", "q_proj: the adapter is for in, out = (32, 32)"],
    ),
    "verified against another base model": ("verify trained --base wider", 1, ["the base has [64, 64]", "NOT sound"]),
    "a directory to verify is misspelt": ("verify tained", 2, ["tained: found nothing, expected a directory"]),
    "a base to verify against is misspelt": ("verify trained --base bsae", 2, ["bsae: found nothing"]),
    "an adapter shall go beside a model's weights": (
        TRAIN.replace("new", "base"),
        2,
        ["base: holds a model (config.json), expected another directory"],
    ),
    "a file is where a directory shall be": (
        TRAIN.replace("new", "data.jsonl/new"),
        2,
        ["data.jsonl: found a file, expected a directory"],
    ),
    "quickstart into a file": ("quickstart --output-dir data.jsonl", 2, ["data.jsonl: found a file"]),
    "a page into a file": (
        "report trained --model base --data data.jsonl --output data.jsonl/page.html",
        2,
        ["output: found the file data.jsonl, expected a directory"],
    ),
    "metrics to a program that is not there": (
        f"{TRAIN} --report-to wandb",
        2,
        ["report_to: wandb needs the package wandb: pip install 'moe-lora-jax[wandb]'"],
    ),
    "an unknown preset": (f"{TRAIN} --preset mixlroa", 2, ["preset: found 'mixlroa'", "did you mean mixlora?"]),
    "a layout is misspelt": ("convert trained x --to mixlroa", 2, ["'mixlroa'", "did you mean mixlora?"]),
    "a layout that cannot express it": ("convert trained x --to mixlora", 2, ["'linear' would be read back as 'ffn'"]),
    "the target is in use": ("convert trained base --to native", 2, ["base: found a directory that is not empty"]),
    "combining mixtures": ("combine trained trained x", 2, ["peft_type: found 'MOE_LORA', expected 'LORA'"]),
    "a damaged file": ("generate --model base --adapter damaged --prompt hi", 2, ["damaged", "digest"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def furnished(tmp_path_factory, small_dirs):  # noqa: F811
    """A directory with everything that can be got wrong."""
    made = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(small_dirs["base"], made / "base")
    shutil.copy(small_dirs["data"], made / "data.jsonl")
    (made / "empty.jsonl").write_text("")
    (made / "keys.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (made / "broken.jsonl").write_text('{"text": "a"}\n{"text": "b",}\n')
    shutil.copytree(made / "base", made / "no_tokenizer", ignore=shutil.ignore_patterns("tokenizer*"))
    config = json.loads((made / "base/config.json").read_text())
    for name, fields in (
        ("gpt2", {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}),
        ("quantised", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
    ):
        shutil.copytree(made / "base", made / name)
        (made / name / "config.json").write_text(json.dumps(config | fields))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        sizes = ["--num-experts", "2", "--top-k", "2", "--steps", "1"]
        assert not cli.main(["train", "--model", "base", "--data", "data.jsonl", "--output-dir", "trained", *sizes])
    shutil.copytree(made / "trained", made / "damaged")
    weights = made / "damaged/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small_base.CONFIG, "hidden_size", 64)
        fields = {"vocab_size": 280, "steps": 1, "seed": 0}
        small_base.make_small_base(made / "wider", sentences(5, 0), **fields)
    return made


@pytest.mark.parametrize("mistake", MISTAKES)
def test_is_answered(mistake, furnished, monkeypatch, capfd):
    command, code, answers = MISTAKES[mistake]
    monkeypatch.chdir(furnished)
    before = sorted(furnished.rglob("*"))
    try:
        found = cli.main(command.split())
    except SystemExit as error:  # tyro's own
        found = error.code
    shown = "".join(capfd.readouterr())
    assert found == code, shown
    assert [answer for answer in answers if answer not in shown] == []
    assert "Traceback" not in shown
    assert sorted(furnished.rglob("*")) == before, "something was left behind"


def test_the_import_is_forgotten_in_pytorch(furnished):
    """PEFT's own words cannot be changed; the model card beside the adapter says the line to add."""
    assert "import moe_lora_interop.peft_tuner" in (furnished / "trained/README.md").read_text()
