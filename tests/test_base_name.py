"""What an adapter calls its base model: a name that means something elsewhere, and never a path in a card's YAML."""

import json
import shutil

import peft
import pytest
import transformers
import yaml
from flax import nnx
from huggingface_hub import ModelCard
from tiny_training import compiled_once, small_dirs  # noqa: F401

import moe_lora_interop
import moe_lora_interop.peft_tuner as tuner
import moe_lora_jax as mlj
from moe_lora_interop.config.base_name import HubName, hub_name
from tests.hf import make_model
from tests.verbs import train_verb

pytestmark = pytest.mark.usefixtures("compiled_once")
REVISION = "4e20de362430cd3b72f300e6b0f18e50e7166e08"
CACHED = f"models--someone--tiny-llama/snapshots/{REVISION}"
NAME = "someone/tiny-llama"
SIZES = {"batch_size": 2, "max_length": 64, "r": 2, "target_modules": ("q_proj",), "num_experts": 2, "steps": 1}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gpt2", HubName("gpt2")),
        (NAME, HubName(NAME)),
        (f"/home/me/.cache/huggingface/hub/{CACHED}", HubName(NAME, REVISION)),
        (f"{CACHED}/", HubName(NAME, REVISION)),
        ("hub/models--gpt2/snapshots/abc", HubName("gpt2", "abc")),
        *((path, None) for path in ("/data/base", "../base", "./base", "a/b/c", "~/base", "C:\\base", "a/b/", "", ".")),
        *((path, None) for path in ("x" * 5000, "a\0b", "/" + "y" * 5000)),
        *((path, None) for path in ("a--b/c", "a/b.git", "a/b..c", "someone/name-", "with space/b", "a/b\n")),
        ("C:\\hub\\models--gpt2\\snapshots\\abc", HubName("gpt2", "abc")),
        *((path, None) for path in ("a" * 5000, "null\0byte")),
    ],
)
def test_the_hubs_name(name, found):
    assert hub_name(name) == found


@pytest.mark.parametrize(
    ("stated", "found"), [(NAME, HubName(NAME)), ("/data/base", None), ("gpt2", None), ("", None), (3, None)]
)
def test_a_config_says_what_a_directory_was_made_from(tmp_path, stated, found):
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": stated}))
    assert hub_name(str(tmp_path)) == found


def test_a_broken_config_says_nothing(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert hub_name(str(tmp_path)) is None


def test_a_directory_that_looks_like_a_name_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name("runs/base") is None


def head(directory):
    """The YAML of a card, checked as the Hub does."""
    card = ModelCard.load(directory / "README.md", ignore_metadata_errors=False)
    found = yaml.safe_load(card.data.to_yaml())
    base = found.get("base_model")
    assert base is None or not base.startswith(("/", "."))
    return found


def files(directory):
    return {path.name for path in directory.iterdir()}


def in_cache(base, root):
    """The base as the Hub's cache holds it."""
    directory = root / "hub" / CACHED
    shutil.copytree(base, directory)
    return directory


@pytest.fixture(scope="module")
def base(small_dirs):  # noqa: F811
    return small_dirs["base"]


def adapted(directory):
    config = mlj.MoeLoraConfig(r=2, num_experts=2, target_modules=["q_proj"])
    return mlj.apply_moe_lora(mlj.load_base_model(directory), config, rngs=nnx.Rngs(0))


def test_a_local_base_is_not_in_the_cards_yaml(base, tmp_path):
    mlj.save_pretrained(adapted(base), tmp_path)
    assert "base_model" not in head(tmp_path) and head(tmp_path)["library_name"] == "peft"
    assert moe_lora_interop.read(tmp_path).config.base_model_name_or_path == str(base)


def test_a_base_in_the_hubs_cache_has_its_name_and_revision(base, tmp_path):
    model = adapted(in_cache(base, tmp_path))
    mlj.save_pretrained(model, tmp_path / "out")
    config = moe_lora_interop.read(tmp_path / "out").config
    assert (config.base_model_name_or_path, config.revision) == (NAME, REVISION)
    assert head(tmp_path / "out")["base_model"] == NAME
    found = peft.PeftConfig.from_pretrained(tmp_path / "out")
    assert (found.base_model_name_or_path, found.revision) == (NAME, REVISION)
    mlj.save_pretrained(model, tmp_path / "named", base_name="another/name")
    config = moe_lora_interop.read(tmp_path / "named").config
    assert (config.base_model_name_or_path, config.revision) == ("another/name", None)
    assert head(tmp_path / "named")["base_model"] == "another/name"


def test_a_base_whose_config_says_its_name(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "_name_or_path": NAME}))
    mlj.save_pretrained(adapted(tmp_path / "base"), tmp_path / "out")
    assert moe_lora_interop.read(tmp_path / "out").config.base_model_name_or_path == NAME


@pytest.mark.parametrize("cached", [True, False])
def test_a_save_by_peft_has_no_path_in_its_yaml(tmp_path, cached):
    directory = tmp_path / (f"hub/{CACHED}" if cached else "base")
    make_model("llama").save_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    config = tuner.MoeLoraConfig(r=2, num_experts=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert str(tmp_path) not in text
    found = head(tmp_path / "out")
    assert found.get("base_model") == (NAME if cached else None)
    assert found["library_name"] == "peft" and found["pipeline_tag"] == "text-generation"
    assert (f"base_model:adapter:{NAME}" in found["tags"]) == cached


def test_the_verb_names_the_base_and_saves_the_tokenizer(base, small_dirs, tmp_path, capsys):  # noqa: F811
    train_verb(in_cache(base, tmp_path), small_dirs["data"], tmp_path / "out", **SIZES)
    assert f"base model: {NAME}\n" in capsys.readouterr().out
    assert moe_lora_interop.read(tmp_path / "out").config.base_model_name_or_path == NAME
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    beside = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "what is four plus two?"
    assert beside(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert {"tokenizer.json", "tokenizer_config.json"} <= files(tmp_path / "out")
    for path in (tmp_path / "out").glob("tokenizer*.json"):
        assert str(tmp_path) not in path.read_text(), path

    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "tokenizer_config.json").write_text("mine")
    only = {"steps": 1, "batch_size": 2, "max_length": 64}
    train_verb(
        base, small_dirs["data"], tmp_path / "two", init_adapter=tmp_path / "out", base_name="other/name", **only
    )
    config = moe_lora_interop.read(tmp_path / "two").config
    assert (config.base_model_name_or_path, config.revision) == ("other/name", None)
    assert (tmp_path / "two" / "tokenizer_config.json").read_text() == "mine"
    assert head(tmp_path / "two")["base_model"] == "other/name"
