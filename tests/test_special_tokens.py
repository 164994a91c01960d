"""Special tokens stay as they are: compared with transformers' ids, for ten kinds of tokenizers."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moe_lora_jax.train.data import read_data
from moe_lora_jax.train.tokenizer import pad_id, prompt_ids, text_ids

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _bytes(prefix_space=False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    return made


def _unigram():
    pieces = [("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in LETTERS), ("▁a", -0.5)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made


def _wordpiece():
    vocab = {w: i for i, w in enumerate(["[UNK]", *LETTERS, *("##" + c for c in LETTERS)])}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return made


def _made(base, single=None, **special):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, **special)
    if single is not None:
        words = [w for w in single.split() if w != "$A"]
        ids = [(w, tokenizer.convert_tokens_to_ids(w)) for w in words]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


S = {"bos_token": "<s>", "eos_token": "</s>"}
BERT = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}


def _with_added_tokens():
    made = _made(_bytes(), "<s> $A", **S)
    made.add_tokens([AddedToken("<|l|>", lstrip=True, special=True), AddedToken("<|r|>", rstrip=True, special=True)])
    return made


KINDS = {
    "bytes": lambda: _made(_bytes(), eos_token="</s>"),
    "bos": lambda: _made(_bytes(), "<s> $A", **S),
    "bos_and_eos": lambda: _made(_bytes(), "<s> $A </s>", **S),
    "gemma": lambda: _made(_unigram(), "<bos> $A", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"),
    "bert": lambda: _made(_wordpiece(), "[CLS] $A [SEP]", unk_token="[UNK]", **BERT),
    "unigram": lambda: _made(_unigram(), "$A </s>", unk_token="<unk>", **S),
    "wordpiece": lambda: _made(_wordpiece(), unk_token="[UNK]", **S),
    "added": _with_added_tokens,
    "bos_not_added": lambda: _made(_bytes(), "$A", **S),
    "prefix_space": lambda: _made(_bytes(prefix_space=True), "<s> $A", **S),
    "two_in_front": lambda: _made(_bytes(), "[gMASK] <sop> $A", **S, additional_special_tokens=["[gMASK]", "<sop>"]),
}
FRONT = {"bos": ["<s>"], "bos_and_eos": ["<s>"], "gemma": ["<bos>"], "bert": ["[CLS]"], "added": ["<s>"]}
FRONT |= {"prefix_space": ["<s>"], "two_in_front": ["[gMASK]", "<sop>"]}
BACK = {"bos_and_eos": ["</s>"], "bert": ["[SEP]"], "unigram": ["</s>"]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["a quick fox", " a", "a  b ", "a", "\n\nx", "aaaa", "a<|l|> b <|r|>  c"])
def test_a_text_without_what_is_added_has_transformers_ids(kind, text):
    tokenizer = KINDS[kind]()
    ids = tokenizer(text)["input_ids"]
    assert text_ids(tokenizer, text) == ids
    end = tokenizer.eos_token_id
    assert prompt_ids(tokenizer, text) == (ids[:-1] if BACK.get(kind) and ids[-1] == end else ids)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_text_has_already_is_not_added_again(kind):
    tokenizer = KINDS[kind]()
    front, back = FRONT.get(kind, []), BACK.get(kind, [])
    own = "".join(front) + "a b" + "".join(back)
    bare = tokenizer(own, add_special_tokens=False)["input_ids"]
    assert bare[: len(front)] == tokenizer.convert_tokens_to_ids(front)
    assert text_ids(tokenizer, own) == prompt_ids(tokenizer, own) == bare


def test_a_prompt_keeps_its_own_special_tokens_at_both_ends():
    for kind in ("bytes", "bos", "bos_and_eos", "bos_not_added"):
        tokenizer = KINDS[kind]()
        expected = tokenizer("<s>a</s>", add_special_tokens=False)["input_ids"]
        if tokenizer.bos_token is not None:
            assert prompt_ids(tokenizer, "<s>a</s>") == expected
        assert prompt_ids(tokenizer, "a</s>")[-1] == tokenizer.eos_token_id
    twice = KINDS["bos"]()
    assert prompt_ids(twice, "<s><s>a") == twice("<s>a")["input_ids"]  # two of its own stay two


def test_rendered_text_trains_on_one_beginning_and_one_end(tmp_path):
    tokenizer, path = KINDS["bos_and_eos"](), tmp_path / "data.jsonl"
    records = [{"text": "<s>ab</s>"}, {"text": "ab"}, {"prompt": "<s>a", "completion": "b</s>"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    examples = read_data(path, tokenizer, max_length=99).examples
    assert [e.ids.tolist() for e in examples] == [tokenizer("ab")["input_ids"]] * 3


def test_a_padding_token_that_the_model_has_no_row_for():
    tokenizer = KINDS["bert"]()
    assert pad_id(tokenizer, 1000) == tokenizer.pad_token_id
    assert pad_id(tokenizer, tokenizer.pad_token_id) == 0 == pad_id(KINDS["bos"](), 1000)
