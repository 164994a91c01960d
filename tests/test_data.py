"""Reading JSONL, tokenizing the three forms, and batching."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moe_lora_interop.errors import CheckpointError
from moe_lora_jax.train.batches import TrainBatches, bucket_lengths, collate, eval_batches
from moe_lora_jax.train.data import Example, Tally, read_data, split_by, split_data
from moe_lora_jax.train.errors import DataError
from moe_lora_jax.train.tokenizer import load_tokenizer, prompt_ids

WORDS = "<pad> <s> </s> <unk> a b c d e user assistant system :".split()
ID = {word: i for i, word in enumerate(WORDS)}
MARKED = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} </s> {% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
REWRITING = (
    "{% if messages[-1]['role'] == 'user' %}system : {% endif %}"
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
)
REFUSING = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('first must be the user') }}{% endif %}a b"


def tokenizer(template: str | None = None, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """One id per word; <s> in front, nothing behind."""
    words = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ID["<s>"])])
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    made.chat_template = template
    return made


def write(tmp_path, *records, name="data.jsonl"):
    path = tmp_path / name
    lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def only(path, tok=None, **options):
    (example,) = read_data(path, tok or tokenizer(), **{"max_length": 100, **options}).examples
    return [WORDS[i] for i in example.ids], example.counted.tolist()


def test_text_counts_every_token_and_ends(tmp_path):
    words, counted = only(write(tmp_path, {"text": "a b c"}))
    assert words == ["<s>", "a", "b", "c", "</s>"]
    assert counted == [True] * 5


def test_an_end_token_in_the_text_is_not_doubled(tmp_path):
    assert only(write(tmp_path, {"text": "a b </s>"}))[0] == ["<s>", "a", "b", "</s>"]


def test_a_tokenizer_without_end_token_adds_none(tmp_path):
    assert only(write(tmp_path, {"text": "a b"}), tokenizer(eos=None))[0] == ["<s>", "a", "b"]


def test_completion_alone_is_counted(tmp_path):
    words, counted = only(write(tmp_path, {"prompt": "a b", "completion": "c d", "topic": "ignored"}))
    assert words == ["<s>", "a", "b", "c", "d", "</s>"]
    assert counted == [False, False, False, True, True, True]


def test_the_prompt_has_the_tokens_that_generation_gives_it(tmp_path):
    tok = tokenizer()
    words, counted = only(write(tmp_path, {"prompt": "a b", "completion": "c"}), tok)
    assert [ID[w] for w in words[: counted.index(True)]] == prompt_ids(tok, "a b")


def test_an_end_token_that_the_tokenizer_puts_behind_the_prompt_is_removed():
    tok = tokenizer()
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert prompt_ids(tok, "a") == [ID["<s>"], ID["a"]]


CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d e"},
]


def test_messages_count_all_that_the_template_marks(tmp_path):
    words, counted = only(write(tmp_path, {"messages": CHAT}), tokenizer(MARKED))
    assert " ".join(words) == "user : a assistant : b </s> user : c assistant : d e </s>"
    assert [w for w, c in zip(words, counted, strict=True) if c] == ["b", "</s>", "d", "e", "</s>"]


def test_messages_count_every_turn_of_the_assistant_if_the_template_marks_nothing(tmp_path):
    words, counted = only(write(tmp_path, {"messages": CHAT}), tokenizer(PLAIN))
    assert " ".join(words) == "user : a </s> assistant : b </s> user : c </s> assistant : d e </s>"
    assert [w for w, c in zip(words, counted, strict=True) if c] == ["b", "</s>", "d", "e", "</s>"]


def test_blank_lines_and_a_byte_order_mark_are_skipped_and_lines_counted(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + b'{"text": "a"}', "", "   ", {"text": "b"})
    assert [e.line for e in read_data(path, tokenizer(), max_length=9).examples] == [1, 4]


BAD = [
    ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
    (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
    ("[1]", "found list, expected an object"),
    ({"txt": "a"}, "found txt; expected text, or prompt and completion, or messages"),
    ({}, "found nothing; expected text"),
    ({"text": "a", "prompt": "b"}, "found prompt, text; expected text, or"),
    ({"prompt": "a"}, "completion is missing beside prompt"),
    ({"completion": "a"}, "prompt is missing beside completion"),
    ({"text": 3}, "text: found int, expected a string"),
    ({"text": ""}, "text: empty"),
    ({"prompt": "a", "completion": ""}, "completion: empty"),
    ({"messages": []}, "messages: expected a list of at least one message"),
    ({"messages": [{"role": "user"}]}, "messages[0]: expected an object with the strings role and content"),
    ({"messages": [CHAT[0], "hi"]}, "messages[1]: expected an object"),
    ({"messages": CHAT[:1]}, "the last message is from 'user', expected 'assistant'"),
    ("[" * 100_000, "nested too deeply"),
]


def test_every_bad_line_is_named_in_one_error(tmp_path):
    path = write(tmp_path, {"text": "a"}, *(record for record, _ in BAD), {"text": "b"})
    with pytest.raises(DataError) as caught:
        read_data(path, tokenizer(PLAIN), max_length=9)
    assert isinstance(caught.value, CheckpointError)
    assert len(caught.value.problems) == len(BAD)
    for number, (problem, (_, expected)) in enumerate(zip(caught.value.problems, BAD, strict=True), start=2):
        assert problem.startswith(f"{path}:{number}: ")
        assert expected in problem
    assert f"{len(BAD)} bad lines" in str(caught.value)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (None, CHAT, "the tokenizer has none"),
        (REWRITING, CHAT, "mark it with {% generation %}"),
        (REFUSING, CHAT[1:2], "first must be the user"),
        (MARKED, CHAT[:1], "none of them with loss"),
    ],
)
def test_messages_that_the_template_cannot_serve(tmp_path, template, messages, expected):
    with pytest.raises(DataError) as caught:
        read_data(write(tmp_path, {"messages": messages}), tokenizer(template), max_length=50)
    assert expected in caught.value.problems[0]


def test_a_text_of_one_token_has_nothing_to_learn(tmp_path):
    with pytest.raises(DataError, match="1 tokens and none of them with loss"):
        read_data(write(tmp_path, {"text": "</s>"}), _without_bos(), max_length=9)


def _without_bos():
    tok = tokenizer()
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return tok


def test_a_token_beyond_the_models_vocabulary(tmp_path):
    with pytest.raises(DataError, match="data.jsonl:2: token id 8, the model's vocabulary has 8"):
        read_data(write(tmp_path, {"text": "a"}, {"text": "e"}), tokenizer(), max_length=9, vocab_size=8)


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_no_data(tmp_path, content):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="no examples"):
        read_data(tmp_path / "data.jsonl", tokenizer(), max_length=9)


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl: No such file"):
        read_data(tmp_path / "nowhere.jsonl", tokenizer(), max_length=9)
    with pytest.raises(DataError, match="Is a directory"):
        read_data(tmp_path, tokenizer(), max_length=9)


def test_what_the_length_limit_does_is_reported(tmp_path):
    path = write(
        tmp_path, {"text": "a b"}, {"text": "a b c d e"}, {"prompt": "a b c d e", "completion": "a"}, {"text": "a b c"}
    )
    data = read_data(path, tokenizer(), max_length=5)
    assert (data.truncated, data.dropped) == (Tally(1, (2,)), Tally(1, (3,)))
    assert [len(e.ids) for e in data.examples] == [4, 5, 5]
    assert "1 cut at max_length (lines 2)" in data.describe()
    assert "1 left out, no token with loss within max_length (lines 3)" in data.describe()
    with pytest.raises(DataError, match="no example has a token with loss within max_length = 5"):
        read_data(write(tmp_path, {"prompt": "a b c d e", "completion": "a"}), tokenizer(), max_length=5)


def test_a_missing_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_model_alone_is_not_tiktokens(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == "sentencepiece" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(CheckpointError, match="which is SentencePiece's, .*: pip install sentencepiece protobuf, or"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(CheckpointError, match="cannot read the tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "SentencePiece" not in str(error.value)


def test_a_tokenizer_that_git_lfs_did_not_fetch(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="tokenizer.json: found a Git LFS pointer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_from_a_model_directory(tmp_path):
    tokenizer(PLAIN).save_pretrained(tmp_path)
    assert only(write(tmp_path, {"messages": CHAT}), load_tokenizer(tmp_path))[1].count(True) == 5


def examples(count, low=3, high=40, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for line in range(1, count + 1):
        ids = rng.integers(1, 50, rng.integers(low, high)).astype(np.int32)
        made.append(Example(ids, rng.random(len(ids)) < 0.5, line))
    return made


def test_split_is_a_partition_that_depends_on_the_seed_alone(tmp_path):
    data = read_data(write(tmp_path, *({"text": "a b"} for _ in range(20))), tokenizer(), max_length=9)
    train, held_out = split_data(data, 0.25, seed=1)
    lines = [e.line for e in train.examples], [e.line for e in held_out.examples]
    assert len(lines[1]) == 5
    assert sorted(lines[0] + lines[1]) == list(range(1, 21))
    assert [e.line for e in split_data(data, 0.25, seed=1)[1].examples] == lines[1]
    assert [e.line for e in split_data(data, 0.25, seed=2)[1].examples] != lines[1]
    assert len(split_data(data, 0.001, seed=1)[1].examples) == 1
    with pytest.raises(DataError, match="20 examples, of which eval_fraction 0.99 takes 20"):
        split_data(data, 0.99, seed=1)


def test_split_by_a_key_of_the_lines(tmp_path):
    keys = [{"topic": "a"}, {"topic": 3}, {}, {"topic": "a"}]
    data = read_data(write(tmp_path, *({"text": "a b", **key} for key in keys)), tokenizer(), max_length=9)
    parts = split_by(replace(data, examples=data.examples[::-1]), "topic")
    assert {value: [e.line for e in part.examples] for value, part in parts.items()} == {
        "a": [1, 4],
        "3": [2],
        "all": [3],
    }


def test_digest_changes_with_any_token_or_mask(tmp_path):
    digests = {
        read_data(write(tmp_path, *records), tokenizer(), max_length=20).digest
        for records in (
            [{"text": "a b c"}],
            [{"text": "a b d"}],
            [{"prompt": "a", "completion": "b c"}],
            [{"text": "a b c"}, {"text": "a b"}],
        )
    }
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("longest", "expected"),
    [(5, (8,)), (32, (32,)), (33, (32, 40)), (200, (32, 64, 128, 200)), (256, (32, 64, 128, 256))],
)
def test_bucket_lengths(longest, expected):
    assert bucket_lengths(longest) == expected


def test_collate_pads_and_loses_nothing():
    chosen = examples(3)
    batch, lines = collate(chosen, rows=4, lengths=bucket_lengths(40), pad_id=0)
    assert batch.input_ids.shape == (4, 40)
    assert lines.tolist() == [1, 2, 3, 0]
    for row, e in enumerate(chosen):
        real = batch.attention_mask[row] > 0
        assert real.sum() == len(e.ids) and real[: len(e.ids)].all()
        np.testing.assert_array_equal(batch.input_ids[row][real], e.ids)
        np.testing.assert_array_equal(batch.loss_mask[row][real], e.counted)
        assert not batch.loss_mask[row][~real].any()
    assert not batch.attention_mask[3].any() and not batch.loss_mask[3].any()


def batches_of(data, epochs=4, seed=0):
    return TrainBatches(data, batch_size=2, gradient_accumulation=2, epochs=epochs, seed=seed, pad_id=0)


def test_an_epoch_has_every_example_once_in_another_order_each_time():
    data = examples(10)
    batches = list(batches_of(data, epochs=2))
    assert [b.batch.input_ids.shape[:2] for b in batches] == [(2, 2)] * 5
    lines = np.concatenate([b.lines for b in batches])
    assert sorted(lines[:10]) == sorted(lines[10:]) == list(range(1, 11))
    assert lines[:10].tolist() != lines[10:].tolist()
    assert sum(b.batch.attention_mask.sum() for b in batches) == 2 * sum(len(e.ids) for e in data)


def test_the_last_batch_of_the_last_epoch_is_filled_up_with_blank_rows():
    lines = np.concatenate([b.lines for b in batches_of(examples(6), epochs=1)])
    assert sorted(lines) == [0, 0, 1, 2, 3, 4, 5, 6]


def test_order_depends_on_the_seed_alone_and_can_be_restored():
    data = examples(10)
    reference = batches_of(data)
    lines = [next(reference).lines.tolist() for _ in range(8)]
    again, other = batches_of(data), batches_of(data, seed=1)
    for expected in lines[:3]:
        assert next(again).lines.tolist() == expected
    assert [next(other).lines.tolist() for _ in range(3)] != lines[:3]
    state = json.loads(json.dumps(again.state()))
    resumed = batches_of(data)
    resumed.restore(state)
    assert [next(resumed).lines.tolist() for _ in range(5)] == lines[3:]


def test_one_example_is_enough():
    batches = TrainBatches(examples(1), batch_size=1, gradient_accumulation=1, epochs=3, seed=0, pad_id=0)
    assert [b.lines.tolist() for b in batches] == [[1]] * 3


def test_evaluation_sees_every_example_once():
    data = examples(7)
    batches = list(eval_batches(data, batch_size=3, pad_id=0))
    assert sorted(np.concatenate([b.lines for b in batches])) == [0, 0, *range(1, 8)]
    assert {b.batch.input_ids.shape for b in batches} <= {(3, 32), (3, 40)}
