"""What PEFT saves beside an adapter: the base model's head and embeddings, resized ones, whole modules."""

import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import moe_lora_interop
import moe_lora_interop.peft_tuner as tuner
import moe_lora_jax as mlj
from moe_lora_interop import CheckpointError
from moe_lora_interop.cli.main import main
from moe_lora_interop.rules.base_tensors import base_tensors, name_in_base
from moe_lora_interop.rules.tensors import Rule, claimed

HEAD, SAVED = "lm_head.base_layer.weight", "base_model.model.lm_head.base_layer.weight"
EMBEDDINGS = {"lm_head.weight", "model.embed_tokens.weight"}
LEFT_OUT = "belong to the base model"
KINDS = {"moe": (tuner.MoeLoraConfig, {"num_experts": 3}), "lora": (peft.LoraConfig, {})}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:.*save_embedding_layers"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{is tied: directory of a tiny Llama}."""
    made = {}
    for tied in (True, False):
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=tied)
        made[tied] = tmp_path_factory.mktemp(f"tied_{tied}")
        transformers.LlamaForCausalLM(config).save_pretrained(made[tied])
    return made


def saved_by_peft(base, directory, *, kind="moe", vocabulary=None, save_embedding_layers="auto", **fields):
    """What PEFT writes for an adapter on `base`."""
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary)
    config, sizes = KINDS[kind]
    fields = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **sizes, **fields}
    model = peft.get_peft_model(model, config(**fields))
    model.save_pretrained(directory, save_embedding_layers=save_embedding_layers)
    return directory


def changed(directory, name, change):
    """The same directory with another value of one stored tensor."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, {"format": "pt"})
    return directory


def errors(directory, base):
    return [f.message for f in moe_lora_interop.verify(directory, base) if f.level == "error"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_targeted_head_is_read_without_its_base_and_says_so(bases, tmp_path, kind, tied):
    base = bases[tied]
    saved_by_peft(base, tmp_path, kind=kind, target_modules=["q_proj", "lm_head"])
    with pytest.warns(UserWarning, match=LEFT_OUT) as warned:
        adapter = moe_lora_interop.read(tmp_path)
    assert [str(w.message) for w in warned if LEFT_OUT in str(w.message)] != [] and len(warned) == 1
    assert adapter.modules == ["lm_head", "model.layers.0.self_attn.q_proj"]
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    assert adapter.base_tensors.keys() == {HEAD}
    np.testing.assert_array_equal(adapter.base_tensors[HEAD], model.lm_head.weight.detach().numpy())
    notes = [f.message for f in moe_lora_interop.verify(tmp_path) if HEAD in f.message]
    assert len(notes) == 1 and errors(tmp_path, None) == [] and errors(tmp_path, base) == []
    assert [HEAD in note for note in moe_lora_interop.inspect(tmp_path).notes] == [True]


def test_a_head_that_the_base_has_is_loaded_in_jax_and_computes_as_in_peft(bases, tmp_path):
    saved_by_peft(bases[False], tmp_path, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = mlj.load_adapter(mlj.load_base_model(bases[False]), tmp_path)  # a warning would be an error
    ids = np.asarray([[1, 5, 7, 9]])
    theirs = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(bases[False]), tmp_path)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(np.asarray(model(ids)), expected, atol=1e-5)
    mlj.save_pretrained(model, tmp_path / "again")
    assert SAVED not in load_file(tmp_path / "again" / "adapter_model.safetensors")
    bank = mlj.AdapterBank(mlj.load_base_model(bases[False], dtype="bfloat16"), {"one": tmp_path})
    assert bank.names == ["one"]  # compared in bfloat16


def test_a_head_that_was_trained_is_refused_by_name(bases, tmp_path):
    saved_by_peft(bases[False], tmp_path, target_modules=["q_proj", "lm_head"])
    changed(tmp_path, SAVED, lambda head: head + np.float32(1e-3) * (np.arange(40) == 7)[:, None])
    (problem,) = errors(tmp_path, bases[False])
    assert problem.startswith("lm_head.weight: other values than the base") and "PyTorch" in problem
    with pytest.raises(CheckpointError, match="lm_head.weight: other values than the base"):
        mlj.load_adapter(mlj.load_base_model(bases[False]), tmp_path)
    with pytest.raises(CheckpointError, match="lm_head.weight: other values than the base"):
        mlj.AdapterBank(mlj.load_base_model(bases[False]), {"one": tmp_path})


def test_a_tied_head_says_why_jax_has_no_layer_for_it(bases, tmp_path):
    saved_by_peft(bases[True], tmp_path, target_modules=["q_proj", "lm_head"])
    with pytest.raises(CheckpointError, match="tied to the embeddings"):
        mlj.load_adapter(mlj.load_base_model(bases[True]), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_peft_was_asked_to_save_are_compared(bases, tmp_path, tied):
    saved_by_peft(bases[tied], tmp_path, save_embedding_layers=True)
    assert errors(tmp_path, bases[tied]) == []
    mlj.load_adapter(mlj.load_base_model(bases[tied]), tmp_path)
    changed(tmp_path, "base_model.model.model.embed_tokens.weight", lambda rows: rows * 2)
    assert [p.partition(":")[0] for p in errors(tmp_path, bases[tied])] == ["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match="model.embed_tokens.weight: other values than the base"):
        mlj.load_adapter(mlj.load_base_model(bases[tied]), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_is_named(bases, tmp_path, tied):
    saved_by_peft(bases[tied], tmp_path, vocabulary=45)
    problems = errors(tmp_path, bases[tied])
    assert {p.partition(":")[0] for p in problems} == EMBEDDINGS
    assert all("shape [45, 16], the base has [40, 16]: the vocabulary was resized" in p for p in problems)
    with pytest.raises(CheckpointError, match="the vocabulary was resized"):
        mlj.load_adapter(mlj.load_base_model(bases[tied]), tmp_path)


def test_the_way_out_for_a_resized_vocabulary_works(bases, tmp_path):
    torch.manual_seed(1)
    resized = transformers.LlamaForCausalLM.from_pretrained(bases[False])
    resized.resize_token_embeddings(45)
    resized.save_pretrained(tmp_path / "base")
    saved_by_peft(tmp_path / "base", tmp_path / "out", save_embedding_layers=True)
    assert errors(tmp_path / "out", tmp_path / "base") == []
    mlj.load_adapter(mlj.load_base_model(tmp_path / "base"), tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_whole_modules_are_refused_by_name(bases, tmp_path, kind):
    saved_by_peft(bases[False], tmp_path, kind=kind, modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match="modules_to_save: found.*base_model.model.lm_head.weight was trained"):
        moe_lora_interop.read(tmp_path)
    assert "PEFT" in errors(tmp_path, None)[0]


def test_a_quantised_base_cannot_be_compared_and_says_so(bases, tmp_path):
    pytest.importorskip("qwix", reason="needs the extra quant (pip install 'moe-lora-jax[quant]')")
    saved_by_peft(bases[False], tmp_path, save_embedding_layers=True)
    model = mlj.quantize_base(mlj.load_base_model(bases[False]), "int8", block_size=8)
    with pytest.warns(UserWarning, match="cannot be compared with this base"):
        mlj.load_adapter(model, tmp_path)


def test_convert_and_combine_leave_them_out_and_say_so(bases, tmp_path):
    for name in "ab":
        saved_by_peft(bases[False], tmp_path / name, kind="lora", target_modules=["q_proj", "lm_head"])
    with pytest.warns(UserWarning, match=LEFT_OUT):
        assert not main(["convert", str(tmp_path / "a"), str(tmp_path / "native"), "--to", "native", "--quiet"])
    assert SAVED not in load_file(tmp_path / "native" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=LEFT_OUT):
        mlj.combine(mlj.load_base_model(bases[False]), [tmp_path / "a", tmp_path / "b"])
    changed(tmp_path / "b", SAVED, lambda head: head + 1)
    with (
        pytest.warns(UserWarning, match=LEFT_OUT),
        pytest.raises(CheckpointError, match="lm_head.base_layer.weight: other values than in the adapters before"),
    ):
        mlj.combine(mlj.load_base_model(bases[False]), [tmp_path / "a", tmp_path / "b"])


def test_only_names_that_peft_writes_are_taken_for_the_bases():
    rules = moe_lora_interop.dialects.NATIVE.rules
    prefix, matrix = "base_model.model.", np.zeros((2, 3), np.float32)
    known = [HEAD, "lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight", "lm_head.base_layer.bias"]
    stored = {prefix + name: matrix[0] if name.endswith("bias") else matrix for name in known}
    assert base_tensors(claimed(rules, stored)[0]).keys() == set(known)
    assert name_in_base(HEAD) == "lm_head.weight"
    others = [
        "lm_head.moe_lora_B",
        "model.layers.0.self_attn.q_proj.weight",
        "lm_head.lora_A.weight",
        "lm_head.other",
    ]
    others = {prefix + name: matrix for name in others} | {"lm_head.weight": matrix}
    assert base_tensors(claimed(rules, others)[0]) == {}


def test_a_rule_for_the_bases_tensors_is_never_written():
    rule = Rule("base_weight", "{module}.weight", "out in", canonical_axes="out in", copy="base")
    _, problems = moe_lora_interop.rules.encode([rule], {("m", "base_weight"): np.zeros((2, 3))}, lambda module: {})
    assert problems == ["m base_weight: this layout has no place for it"]


def test_the_whole_file_is_read_without_a_warning_if_there_is_nothing_to_say(bases, tmp_path):
    saved_by_peft(bases[False], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert moe_lora_interop.read(tmp_path).base_tensors == {}
    assert moe_lora_interop.inspect(tmp_path).notes == []
