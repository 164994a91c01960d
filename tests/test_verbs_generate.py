"""`moe-lora generate`: the text on standard output is what decoding gives."""

import json

import jax.numpy as jnp
import pytest
import tyro
from tiny_training import compiled_once, small_dirs  # noqa: F401
from transformers import AutoTokenizer

from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_jax.cli.generate import generate
from moe_lora_jax.demo.topics import questions
from moe_lora_jax.models import load_base_model
from tests.verbs import train_verb

PROMPT = "Question: what is two plus two?\nAnswer:"


@pytest.fixture(scope="module")
def made(small_dirs, compiled_once):  # noqa: F811
    """A base and an adapter that has learnt to say one thing."""
    directory = small_dirs["base"].parent
    data, adapter = directory / "soup.jsonl", directory / "adapter"
    data.write_text(json.dumps({"prompt": PROMPT, "completion": " soup."}) + "\n")
    train_verb(
        directory / "base", data, adapter, steps=40, learning_rate=0.1, batch_size=1, target_modules=("down_proj",)
    )
    return directory


def test_greedy_text_equals_repeated_forward_passes(made, capsys):
    generate(made / "base", PROMPT, max_new_tokens=6)
    model, tokenizer = load_base_model(made / "base"), AutoTokenizer.from_pretrained(made / "base")
    ids = tokenizer(PROMPT)["input_ids"]
    start, longest = len(ids), len(ids) + 6
    while len(ids) < longest and ids[-1] != tokenizer.eos_token_id:
        padded = jnp.asarray([ids + [0] * (longest - len(ids))])  # one shape; what follows a token cannot change it
        ids.append(int(jnp.argmax(model(padded)[0, len(ids) - 1])))
    assert capsys.readouterr().out == tokenizer.decode(ids[start:], skip_special_tokens=True) + "\n"


def test_the_adapter_is_used_and_the_end_token_ends(made, capsys):
    line = ["--model", str(made / "base"), "--adapter", str(made / "adapter"), "--prompt", PROMPT]
    tyro.cli(generate, args=line)
    assert capsys.readouterr().out == " soup.\n"


def test_sampling_depends_on_the_seed(made, capsys):
    texts = []
    for seed in (0, 0, 1):
        generate(made / "base", PROMPT, max_new_tokens=12, temperature=2.0, top_k=50, top_p=0.95, seed=seed)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_chat_goes_through_the_template(made, tmp_path, capsys):
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        generate(made / "base", PROMPT, chat=True)
    for path in (made / "base").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stated = json.loads((tmp_path / "tokenizer_config.json").read_text())
    stated["chat_template"] = "{{ bos_token }}{{ messages[0]['content'] }}{% if add_generation_prompt %} so{% endif %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    generate(tmp_path, "the soup is", chat=True, max_new_tokens=5)
    by_template = capsys.readouterr().out
    generate(made / "base", "the soup is so", max_new_tokens=5)
    assert capsys.readouterr().out == by_template


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
    ],
)
def test_wrong_arguments(made, arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        generate(made / "base", PROMPT, **arguments)


def test_missing_files(made, tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        generate(tmp_path, PROMPT)
    with pytest.raises(CheckpointError):
        generate(made / "base", PROMPT, adapter=tmp_path)


def test_the_questions_fit_the_small_models_context(made):
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    assert max(len(tokenizer(q.prompt + q.completion)["input_ids"]) for q in questions(5, 0)) < 256
