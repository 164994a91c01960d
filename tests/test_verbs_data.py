"""`moe-lora data`: which tokens count, shown in the text as the template renders it."""

import json

import pytest
from chat_templates import CHATML, LLAMA_3, MARKED, chat_tokenizer

from moe_lora_interop.errors import ConfigError
from moe_lora_jax.cli.data import data

TURNS = [
    {"role": "user", "content": "Wie geht's? 你好"},
    {"role": "assistant", "content": "Gut, danke.\n"},
    {"role": "user", "content": "And the weather?"},
    {"role": "assistant", "content": "  rain 🌧 "},
]


@pytest.fixture
def model(tmp_path):
    """A directory with a tokenizer, and a config that says how many rows its model has."""

    def make(template):
        tokenizer = chat_tokenizer(template)
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text(
            json.dumps({"model_type": "llama", "vocab_size": len(tokenizer)})
        )
        return tmp_path / "model"

    return make


@pytest.mark.parametrize(
    ("template", "ends"), [(CHATML, "<|im_end|>\n"), (MARKED, "<|im_end|>\n"), (LLAMA_3, "<|eot|>")]
)
def test_the_answers_are_marked_and_nothing_else(model, tmp_path, capsys, template, ends):
    import jinja2

    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join([json.dumps({"messages": TURNS}), json.dumps({"text": "One more."})]))
    data(file, model=model(template), json=True)
    found = json.loads(capsys.readouterr().out)
    chat, text = (example["parts"] for example in found["examples"])
    plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert "".join(part["text"] for part in chat) == jinja2.Template(plain).render(messages=TURNS)
    strip = str.strip if "trim" in template else str
    answers = [strip(m["content"]) + ends for m in TURNS if m["role"] == "assistant"]
    assert [part["text"] for part in chat if part["loss"]] == answers
    assert [(part["loss"], part["text"]) for part in text] == [
        (False, "O"),
        (True, "ne more.</s>"),
    ]  # O has no prediction
    assert found["lengths"]["longest"] == sum(len(part["ids"]) for part in chat) == found["examples"][0]["tokens"]
    assert "2 examples" in found["summary"]


def test_the_text_shows_them_in_brackets_and_no_control_characters(model, tmp_path, capsys):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "a\x1b[31m\n", "completion": "b"}) + "\n" + json.dumps({"text": "cd"}))
    data(file, model=model(CHATML), show=1)
    shown = capsys.readouterr().out
    assert "line 1, 9 tokens" in shown and "⟦b</s>⟧" in shown and "\x1b" not in shown and "line 2" not in shown
    data(file, model=tmp_path / "model", show=1, quiet=True)
    assert capsys.readouterr().err == ""


def test_a_negative_number_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="show: found -1, expected an integer >= 0"):
        data(tmp_path / "data.jsonl", model=tmp_path, show=-1)
