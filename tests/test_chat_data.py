"""Conversations: which tokens carry loss, template by template, and the forms in which people have them."""

import gzip
import json

import pytest
from chat_templates import (
    CHATML,
    DEEPSEEK,
    DEFAULT_SYSTEM,
    ENDING_ONCE,
    GEMMA,
    LLAMA_2,
    LLAMA_3,
    MARKED,
    MISTRAL,
    PARTS,
    PRINTING,
    QWEN_3,
    chat_tokenizer,
)

from moe_lora_interop.errors import CheckpointError
from moe_lora_jax.train.data import Tally, read_data, split_by
from moe_lora_jax.train.errors import DataError
from moe_lora_jax.train.template import ChatTemplate
from moe_lora_jax.train.tokenizer import load_tokenizer

TURNS = [
    {"role": "user", "content": "One or two?"},
    {"role": "assistant", "content": "Two, I say."},
    {"role": "user", "content": "Why é?"},
    {"role": "assistant", "content": "Because 🙂."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Good bye!"},
]
SYSTEM = {"role": "system", "content": "Be short."}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLS = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "No rain."},
]


def write(tmp_path, *records, name="chat.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(tmp_path, template, *records, **options):
    return read_data(write(tmp_path, *records), chat_tokenizer(template), max_length=2000, **options)


def said(data, template):
    """What the tokens with loss say, one string for each run of them, in the first example."""
    (example, *_) = data.examples
    runs, run = [], []
    for token, counts in zip([*example.ids.tolist(), None], [*example.counted.tolist(), False], strict=True):
        if counts:
            run.append(token)
        elif run:
            runs.append(chat_tokenizer(template).decode(run))
            run = []
    return runs


def answers(end, messages=TURNS, start=""):
    return [f"{start}{m['content']}{end}" for m in messages if m["role"] == "assistant"]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, TURNS, answers("<|im_end|>\n")),
        (CHATML, [SYSTEM, *TURNS], answers("<|im_end|>\n")),
        (MARKED, TURNS, answers("<|im_end|>\n")),
        (LLAMA_2, TURNS, answers(" </s>", start=" ")),
        (LLAMA_2, [SYSTEM, *TURNS], answers(" </s>", start=" ")),
        (LLAMA_3, [SYSTEM, *TURNS], answers("<|eot|>")),
        (GEMMA, TURNS, answers("<end_of_turn>\n")),
        (QWEN_3, TURNS, [*answers("<|im_end|>\n")[:2], "<think>\n\n</think>\n\nGood bye!<|im_end|>\n"]),
        (MISTRAL, TURNS, answers("</s>", start=" ")),
        (ENDING_ONCE, TURNS, [*answers("<|im_end|>\n")[:2], "Good bye!<|im_end|>\n</s>"]),
        (PARTS, TURNS, answers("<|im_end|>\n")),
        (DEEPSEEK, TURNS, answers("</s>")),
        *((t, TURNS[1:], answers("<|im_end|>\n")) for t in (CHATML, DEFAULT_SYSTEM, MARKED)),
        (LLAMA_3, TURNS[1:], answers("<|eot|>")),
    ],
)
def test_every_turn_of_the_assistant_counts_and_nothing_else(tmp_path, template, messages, expected):
    data = read(tmp_path, template, {"messages": messages})
    assert said(data, template) == expected
    assert not data.lost and "no loss" not in data.describe()
    ids = chat_tokenizer(template).apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    if template is not PARTS:
        assert data.examples[0].ids.tolist() == ids


def test_a_turn_after_one_that_the_template_does_not_open(tmp_path):
    data = read(tmp_path, DEEPSEEK, {"messages": [*TURNS[:2], {"role": "tool", "content": "x"}, *TURNS[1:]]})
    assert said(data, DEEPSEEK) == answers("</s>", [TURNS[1], *TURNS[1:]]) and not data.lost


def test_a_call_that_the_template_leaves_out_is_no_answer(tmp_path):
    """transformers gives a template no content where it is null, and this one shows calls only if it is none."""
    with pytest.raises(DataError, match="chat.jsonl:1: the chat template leaves out the call of 'weather'"):
        read(tmp_path, DEEPSEEK, {"messages": CALLS})


def test_the_template_speaks_of_the_usual_spelling(tmp_path):
    alternating = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('No tools') }}{% endif %}"
    with pytest.raises(DataError, match="chat.jsonl:1: the chat template refuses these messages: No tools"):
        read(tmp_path, alternating + "{{ m.content.strip() }}{% endfor %}", {"messages": CALLS})


def test_a_turn_between_added_tokens_that_are_not_special(tmp_path):
    template = CHATML.replace("im_end", "fin").replace(
        "{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add"
    )
    tokenizer = chat_tokenizer(template)
    tokenizer.add_tokens(["<|fin|>", "\n"])
    data = read_data(write(tmp_path, {"messages": TURNS}), tokenizer, max_length=2000)
    (example,) = data.examples
    said = tokenizer.decode(example.ids[example.counted])
    assert said == "".join(answers("<|fin|>\n")) + "</s>" and not data.lost
    assert ChatTemplate(tokenizer).end_token == tokenizer.convert_tokens_to_ids("<|fin|>")


UNMARKED_END = MARKED.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n")
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(("template", "ends"), [(UNMARKED_END, False), (PLAIN, False), (MARKED, True), (CHATML, True)])
def test_an_answer_that_nothing_ends_is_said(tmp_path, template, ends):
    data = read(tmp_path, template, {"messages": TURNS}, {"prompt": "a", "completion": "b"})
    assert data.endless == (Tally() if ends else Tally(1, (1,)))
    note = "1 conversations end with no token with loss that ends an answer (lines 1), so nothing teaches the model"
    assert (note in data.describe()) == (not ends)


def test_a_system_message_that_the_template_refuses(tmp_path):
    with pytest.raises(DataError, match="chat.jsonl:1: the chat template refuses these messages: System role not supp"):
        read(tmp_path, GEMMA, {"messages": [SYSTEM, *TURNS]})


def test_reasoning_that_the_template_strips_takes_the_loss_of_the_turn_and_is_said(tmp_path):
    thought = [{**m, "content": f"<think>hm</think>{m['content']}"} if m["role"] == "assistant" else m for m in TURNS]
    data = read(tmp_path, QWEN_3, {"messages": TURNS}, {"messages": thought}, {"messages": thought[2:]})
    assert data.lost == Tally(3, (2, 3))
    assert "3 earlier turns of the assistant carry no loss" in data.describe() and "(lines 2, 3)" in data.describe()
    alone = read(tmp_path, QWEN_3, {"messages": thought})
    assert said(alone, QWEN_3) == ["<think>\nhm\n</think>\n\nGood bye!<|im_end|>\n"]


def test_a_system_message_in_the_last_question_takes_no_turn_along(tmp_path):
    data = read(tmp_path, MISTRAL, {"messages": [SYSTEM, *TURNS]})
    assert said(data, MISTRAL) == answers("</s>", start=" ")


def test_earlier_turns_without_the_empty_thought_of_the_generation_prompt(tmp_path):
    record = {"messages": TURNS, "chat_template_kwargs": {"enable_thinking": False}}
    data = read(tmp_path, QWEN_3, record)
    assert said(data, QWEN_3) == answers("<|im_end|>\n") and not data.lost


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_prompt_and_completion_as_messages(tmp_path, template):
    data = read(tmp_path, template, {"prompt": TURNS[:3], "completion": TURNS[3:]})
    assert said(data, template) == answers("<|im_end|>\n")[1:]


def test_tools_reach_the_template_with_their_calls(tmp_path):
    data = read(tmp_path, QWEN_3, {"messages": CALLS, "tools": TOOLS})
    text = chat_tokenizer(QWEN_3).decode(data.examples[0].ids)
    assert text.startswith("<|im_start|>system\n# Tools\n" + json.dumps(TOOLS[0]))
    assert said(data, QWEN_3) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n',
        "<think>\n\n</think>\n\nNo rain.<|im_end|>\n",
    ]
    as_text = read(tmp_path, QWEN_3, {"messages": CALLS, "tools": json.dumps(TOOLS)})
    assert as_text.digest == data.digest
    assert read(tmp_path, QWEN_3, {"messages": CALLS}).digest != data.digest


@pytest.mark.parametrize(("template", "shown"), [(QWEN_3, "{'city'"), (PRINTING, "{'city'")])
def test_arguments_as_json_text_are_openais_own_form(tmp_path, template, shown):
    text_call = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    as_text = [{**m, "tool_calls": [text_call]} if "tool_calls" in m else m for m in CALLS]
    data = read(tmp_path, template, {"messages": as_text})
    text = chat_tokenizer(template).decode(data.examples[0].ids)
    assert '{"city": "Rome"}' in text and shown not in text and "None" not in text
    assert data.digest == read(tmp_path, template, {"messages": CALLS}).digest


def test_what_a_template_does_not_read_is_named_with_its_count(tmp_path):
    record = {"messages": [{**m, "name": "x"} for m in TURNS], "tools": TOOLS, "id": 7, "topic": "t"}
    record |= {"documents": [{"text": "d"}], "chat_template_kwargs": {"style": "loud"}}
    data = read(tmp_path, CHATML, record, {"messages": TURNS, "id": 8}, keys=("topic",))
    assert data.unused == {"id": 2, "tools": 1, "documents": 1, "chat_template_kwargs.style": 1, "messages.name": 1}
    assert "unused key 'id' on 2 lines; unused key 'tools' on 1 line" in data.describe()
    many = read(tmp_path, CHATML, *[{"messages": TURNS, "id": 1}] * 1000)
    assert many.describe().endswith("; unused key 'id' on 1,000 lines")


def test_documents_and_other_variables_reach_the_template(tmp_path):
    template = CHATML + "{{ documents[0].text if documents }}{{ style }}"
    record = {"messages": TURNS, "documents": [{"text": "DOC"}], "chat_template_kwargs": {"style": "LOUD"}}
    data = read(tmp_path, template, record)
    assert chat_tokenizer(template).decode(data.examples[0].ids).endswith("DOCLOUD") and not data.unused


SAME = [
    {"messages": TURNS, "prompt": "One or two?", "prompt_id": "x"},
    {"messages": TURNS, "prompt": None, "completion": None, "text": None},
    {"messages": [{**m, "tool_calls": None, "name": None} for m in TURNS]},
    {"messages": [{**m, "content": [{"type": "text", "text": part} for part in m["content"]]} for m in TURNS]},
    {"conversations": TURNS},
    {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in TURNS
        ]
    },
]


@pytest.mark.parametrize("record", SAME)
def test_forms_that_say_the_same(tmp_path, record):
    assert read(tmp_path, CHATML, record).digest == read(tmp_path, CHATML, {"messages": TURNS}).digest


def message(**fields):
    return {"messages": [{**TURNS[0], **fields}, TURNS[1]]}


IMAGE = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}]
BAD = [
    (message(content=IMAGE), "messages[0].content[1]: found a part of type 'image_url', expected"),
    (message(content=None), "messages[0]: expected an object with the strings role and content"),
    (message(content="cut \ud83d"), "messages[0].content: found half a character, \\ud83d, at position 5"),
    (message(tool_calls={}), "messages[0].tool_calls: found dict, expected a list"),
    (message(tool_calls=["x"]), "messages[0].tool_calls[0]: found str, expected an object"),
    (
        message(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
        "messages[0].tool_calls[0].function.arguments: not JSON: ",
    ),
    (
        message(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]),
        "messages[0].tool_calls[0].function.arguments: found JSON of type list, expected an object",
    ),
    (
        message(tool_calls=[{"function": {"name": "f", "arguments": '{"a": "cut \\ud83d"}'}}]),
        "messages[0].tool_calls[0].function.arguments.a: found half a character, \\ud83d, at position 5",
    ),
    ({"messages": TURNS, "tools": "["}, "tools: not JSON: "),
    ({"messages": TURNS, "tools": '[{"a": "\\ud83d"}]'}, "tools[0].a: found half a character, \\ud83d, at position 1"),
    ({"messages": TURNS, "tools": {"a": 1}}, "tools: found dict, expected a list of objects"),
    ({"messages": TURNS, "chat_template_kwargs": [1]}, "chat_template_kwargs: found list, expected an object"),
    ({"messages": TURNS, "chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs: found tokenize, which"),
    ({"prompt": "a", "completion": TURNS[1:2]}, "found prompt a str and completion a list, expected two"),
    ({"prompt": [], "completion": TURNS[1:2]}, "prompt: expected a list of at least one message"),
    ({"messages": TURNS, "completion": "b"}, "found completion, messages; expected text, or"),
    ({"conversations": [{"from": "tool", "value": "x"}]}, "conversations[0].from: found 'tool', expected one of"),
    ({"text": "a\udc00"}, "text: found half a character, \\udc00, at position 2"),
    ({"messages": TURNS[:-1]}, "the last message is from 'user', expected 'assistant'"),
]


def test_every_bad_line_is_named(tmp_path):
    with pytest.raises(DataError) as caught:
        read(tmp_path, CHATML, *(record for record, _ in BAD))
    assert len(caught.value.problems) == len(BAD)
    for number, (problem, (_, expected)) in enumerate(zip(caught.value.problems, BAD, strict=True), start=1):
        assert problem.startswith(f"{tmp_path / 'chat.jsonl'}:{number}: {expected}")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            CHATML + "{% for k, v in messages[0].content.items() %}{% endfor %}",
            ":1: the chat template refuses",
        ),
        (
            CHATML + "{{ messages[0].content + 1 }}",
            ":1: the chat template fails on these messages: TypeError: ",
        ),
        (CHATML + "{{ 1 / 0 }}", "chat.jsonl:1: the chat template fails on these messages: ZeroDivisionError: "),
        (
            CHATML + "{{ missing.name }}",
            ":1: the chat template refuses these messages: 'missing' is undefined",
        ),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "chat.jsonl:1: the chat template leaves out what the last"),
    ],
)
def test_whatever_a_template_raises_names_the_line(tmp_path, template, expected):
    with pytest.raises(DataError) as caught:
        read(tmp_path, template, {"messages": TURNS})
    assert expected in caught.value.problems[0]


def test_a_template_that_is_none_is_said_once(tmp_path):
    with pytest.raises(DataError) as caught:
        read(tmp_path, "{% for m in messages %}\n{{ m.role }", *[{"messages": TURNS}] * 3)
    assert caught.value.what == "cannot use the chat template" and len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith("line 2: ")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA_2, "</s>"),
        (LLAMA_3, "<|eot|>"),
        (GEMMA, "<end_of_turn>"),
        (QWEN_3, "<|im_end|>"),
        (ENDING_ONCE, "<|im_end|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{{ 1 / 0 }}", None),
    ],
)
def test_the_token_that_closes_a_turn(template, end):
    tokenizer = chat_tokenizer(template, eos="<s>")
    assert ChatTemplate(tokenizer).end_token == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_a_template_from_a_file(tmp_path):
    chat_tokenizer(None).save_pretrained(tmp_path)
    (tmp_path / "mine.jinja").write_text(CHATML, "utf-8-sig")
    path = write(tmp_path, {"messages": TURNS})
    data = read_data(path, load_tokenizer(tmp_path, tmp_path / "mine.jinja"), max_length=2000)
    assert said(data, CHATML) == answers("<|im_end|>\n")
    assert data.digest == read(tmp_path, CHATML, {"messages": TURNS}).digest
    with pytest.raises(DataError, match="the tokenizer has none: use text, or prompt and completion, or give a templ"):
        read_data(path, load_tokenizer(tmp_path), max_length=2000)
    with pytest.raises(CheckpointError, match="nowhere.jinja: No such file"):
        load_tokenizer(tmp_path, tmp_path / "nowhere.jinja")


RECORDS = [{"messages": TURNS, "topic": "a"}, {"text": "x y", "topic": None}, {"messages": TURNS[:2], "topic": "b"}]


def _gz(path, raw):
    path.write_bytes(gzip.compress(raw))


def _parquet(path, raw):
    import pyarrow
    import pyarrow.parquet

    rows = [dict.fromkeys(("messages", "text", "topic")) | json.loads(line) for line in raw.splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("data.json", lambda path, raw: path.write_bytes(raw)),
        ("data.jsonl.gz", _gz),
        ("data.parquet", _parquet),
        ("data.json", lambda path, raw: path.write_bytes(b"\xef\xbb\xbf[" + b",".join(raw.splitlines()) + b"]")),
        (
            "data.json",
            lambda path, raw: path.write_text(json.dumps([json.loads(x) for x in raw.splitlines()], indent=1)),
        ),
        ("data.json.gz", lambda path, raw: _gz(path, b"[\n" + b",\n".join(raw.splitlines()) + b"\n]\n")),
    ],
)
def test_file_formats(tmp_path, name, make):
    tokenizer = chat_tokenizer(CHATML)
    lines = write(tmp_path, *RECORDS)
    make(tmp_path / name, lines.read_bytes())
    expected, found = (read_data(p, tokenizer, max_length=2000, keys=("topic",)) for p in (lines, tmp_path / name))
    assert found.digest == expected.digest and found.unused == expected.unused == {}
    assert [e.line for e in found.examples] == [1, 2, 3]
    assert split_by(found, "topic").keys() == {"a", "b", "all"}


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("data.csv", b"prompt,completion\na,b\n", "found a CSV file, expected JSONL, a JSON array of objects"),
        ("data.jsonl", b"PK\x03\x04...", "found a zip archive, expected JSONL"),
        ("data.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer, not the file itself"),
        ("data.json", b'{\n "data": [\n  {"text": "a"}\n ]\n}\n', "found one JSON object (data), expected JSONL"),
        ("data.json", b'[\n{"text": "a"},\n{"text": ]\n', "a JSON array that is not JSON: Expecting value: line 3"),
        ("data.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "broken gzip file"),
        ("data.parquet", b"PAR1....PAR1", "not parquet that can be read"),
    ],
)
def test_other_formats_are_named_once(tmp_path, name, raw, expected):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        read_data(tmp_path / name, chat_tokenizer(CHATML), max_length=99)
    assert len(caught.value.problems) == 1 and expected in caught.value.problems[0]


def test_a_date_that_python_has_not(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a b"], "when": pyarrow.array([2**40], pyarrow.timestamp("s"))})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(DataError, match="data.parquet: not parquet that can be read: date value out of range"):
        read_data(tmp_path / "data.parquet", chat_tokenizer(CHATML), max_length=99)
