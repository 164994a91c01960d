"""Routers at feed-forward blocks, at the model and for tasks: files and PEFT's verbs."""

import copy
import json
import pickle

import peft
import pytest
import torch
import transformers
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_peft_support import (
    FIELDS,
    THIRD_PARTY_WARNINGS,
    config,
    every_scope,
    input_ids,
    loaded,
    logits,
    out,
    random_,
    tiny_classifier,
    tiny_llama,
    wrapped,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import moe_lora_interop
import moe_lora_interop.peft_tuner as tuner
from moe_lora_interop.dialects.native import NATIVE
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_interop.peft_tuner.router import MoeLoraLayer

pytestmark = THIRD_PARTY_WARNINGS
LOADS = pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu"])


@every_scope
@LOADS
@pytest.mark.parametrize("adapter", ["default", "other"])
def test_save_load_save(tmp_path, name, low_cpu_mem_usage, adapter):
    model = wrapped(name, adapter=adapter)
    model.save_pretrained(tmp_path / "a")
    a = tmp_path / "a" if adapter == "default" else tmp_path / "a" / adapter
    again = loaded(a, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(out(again, name), out(model, name), atol=1e-6 if low_cpu_mem_usage else 0, rtol=0)
    again.save_pretrained(tmp_path / "b")
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (a, tmp_path / "b"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert json.loads((a / "adapter_config.json").read_text()) == json.loads(
        (tmp_path / "b" / "adapter_config.json").read_text()
    )


@every_scope
def test_the_file_is_a_native_one(tmp_path, name):
    wrapped(name).save_pretrained(tmp_path)
    assert moe_lora_interop.detect(tmp_path) == NATIVE.name
    assert moe_lora_interop.read(tmp_path).tensors  # which has every tensor that the config implies, and no other


KEYS = {
    "ffn": "base_model.model.model.layers.1.mlp.moe_lora_router.bias",
    "ffn_adaptive": "base_model.model.model.layers.0.mlp.moe_lora_threshold.weight",
    "layerwise": "base_model.moe_lora_router_1.bias",
    "embedding": "base_model.moe_lora_task_embedding.weight",
    "poly": "base_model.model.model.layers.1.self_attn.q_proj.moe_lora_task_embedding.weight",
}


@pytest.mark.parametrize("name", KEYS)
@LOADS
def test_a_missing_router_is_named_as_in_the_file(tmp_path, name, low_cpu_mem_usage):
    wrapped(name).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    del stored[KEYS[name]]
    stored["base_model.moe_lora_router_7.weight"] = torch.zeros(2, 2)
    save_file(stored, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        loaded(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    missing, unexpected = error.value.problems
    assert missing.startswith(f"{KEYS[name]}: missing, expected shape [")
    assert unexpected == "base_model.moe_lora_router_7.weight: unexpected tensor of shape [2, 2]"


@every_scope
def test_state_dicts_move_between_adapters(name):
    model, other = wrapped(name), wrapped(name, adapter="other")
    set_peft_model_state_dict(other, get_peft_model_state_dict(model), adapter_name="other")
    assert torch.equal(out(other, name), out(model, name))


def test_a_fresh_layerwise_router_records_the_order_of_its_modules(tmp_path):
    model = wrapped("layerwise", target_modules="all-linear", num_experts_pattern={"k_proj": 1})
    model.save_pretrained(tmp_path)
    layer = (
        "self_attn.q_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    assert moe_lora_interop.read(tmp_path).config.module_order == [
        f"model.layers.{i}.{m}" for i in (0, 1) for m in layer
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@every_scope
def test_half_precision_bases(tmp_path, name, dtype, autocast):
    model = peft.get_peft_model(tiny_llama(dtype), config(**FIELDS[name]), autocast_adapter_dtype=autocast)
    random_(model).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32 if autocast else dtype}
    again = loaded(tmp_path, tiny_llama(dtype), autocast_adapter_dtype=autocast)
    assert out(again, name).dtype == dtype and torch.equal(out(again, name), out(model, name))


@every_scope
def test_only_the_adapter_trains_and_all_of_it(name):
    model = wrapped(name)
    out(model.train(), name, grad=True).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == ("moe_lora_" in key), key
        assert (parameter.grad is not None) == ("moe_lora_" in key), key
    assert model.get_model_status().requires_grad == {"default": True}


@every_scope
@pytest.mark.parametrize("is_trainable", [True, False])
def test_is_trainable(tmp_path, name, is_trainable):
    wrapped(name).save_pretrained(tmp_path)
    again = loaded(tmp_path, is_trainable=is_trainable)
    assert {p.requires_grad for n, p in again.named_parameters() if "moe_lora_" in n} == {is_trainable}


@every_scope
def test_disabled_and_unloaded_it_is_the_base_model(name):
    plain, model = logits(tiny_llama()), wrapped(name)
    with model.disable_adapter():  # needs no task ids, and leaves nothing behind
        assert torch.equal(logits(model), plain)
    assert not torch.equal(out(model, name), plain)
    base = model.unload()
    assert not any(isinstance(m, MoeLoraLayer) for m in base.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in base.modules())
    assert base.state_dict().keys() == tiny_llama().state_dict().keys()
    assert torch.equal(logits(base), plain)


def test_a_first_pass_with_the_adapter_is_with_this_one_alone():
    model = wrapped("first_pass")
    before = out(model, "first_pass")
    without = out(wrapped("first_pass", scaling_pass_value=0.0), "first_pass")  # the same parameters
    assert (without - before).abs().max() > 1e-3
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="adapter 'default' takes part in the first pass of its own router"):
        out(model, "first_pass")
    model.set_adapter("default")
    torch.testing.assert_close(out(model, "first_pass"), before, atol=0, rtol=0)


@every_scope
@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_several_adapters_one_at_a_time(tmp_path, name):
    model, alone = wrapped(name), wrapped(name)
    before = out(model, name)
    model.add_adapter("second", config(**(FIELDS[name] | {"num_experts": 2, "top_k": None})))
    model.add_adapter("third", config(target_modules="all-linear", top_k=1))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in alone.named_parameters() if p.requires_grad
    }
    assert torch.equal(out(model, name), before)
    for other in ("second", "third"):
        model.set_adapter(other)
        random_(model, seed=5)
        assert not torch.equal(out(model, name), before)
    model.save_pretrained(tmp_path)
    for other in ("second", "third"):
        again = loaded(tmp_path / other)
        model.set_adapter(other)
        assert torch.equal(out(again, name) if other == "second" else logits(again), out(model, name))
    model.set_adapter("second")
    model.delete_adapter("default")
    model.delete_adapter("third")
    assert not [k for k in model.state_dict() if ".default" in k or ".third" in k]
    assert not any("default" in m.moe_lora_config for m in model.modules() if isinstance(m, MoeLoraLayer))
    assert model.active_adapters == ["second"]
    assert torch.equal(out(model, name), out(loaded(tmp_path / "second"), name))


@every_scope
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_apart(name, copied):
    model = wrapped(name)
    out(model.train(), name, grad=True)
    expected = out(model.eval(), name)
    other = copied(model)
    assert torch.equal(out(other, name), expected)
    assert not {id(m) for m in model.modules()} & {id(m) for m in other.modules()}
    random_(model, seed=9)
    assert torch.equal(out(other, name), expected)
    with model.disable_adapter():
        assert torch.equal(out(other, name), expected)
    assert isinstance(other.unload(), transformers.LlamaForCausalLM)


@every_scope
def test_non_reentrant_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        model = wrapped(name).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        value = out(model, name, grad=True)
        out(model.eval(), name, input_ids() + 1)  # an evaluation in between changes nothing
        with model.disable_adapter():
            logits(model)
        model.train()
        value.square().sum().backward()  # after the context of the task ids
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.requires_grad})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


@every_scope
def test_compiled_without_a_graph_break(name):
    model = wrapped(name)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(out(compiled, name), out(model, name))
    assert torch.equal(out(compiled, name, input_ids() + 1), out(model, name, input_ids() + 1))


@pytest.mark.parametrize("name", ["ffn", "layerwise", "embedding"])
def test_a_trainer_run(tmp_path, name):
    class WithTasks(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            tasks = inputs.pop("task_ids")
            if "num_tasks" not in FIELDS[name]:
                return super().compute_loss(model, inputs, return_outputs, **kwargs)
            with tuner.task_routing(model, tasks):
                return super().compute_loss(model, inputs, return_outputs, **kwargs)

    data = [{"input_ids": row, "labels": row, "task_ids": torch.tensor(i % 4)} for i, row in enumerate(input_ids(8))]
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=6,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        remove_unused_columns=False,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = WithTasks(wrapped(name), arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_other_task_types():
    model = wrapped("layerwise", tiny_classifier(), task_type="SEQ_CLS").eval()
    assert out(model, "layerwise").shape == (2, 3)
    features = wrapped("model", tiny_llama().model, task_type="FEATURE_EXTRACTION")
    with torch.no_grad():
        twice = [features(input_ids()).last_hidden_state for _ in range(2)]
    assert torch.equal(*twice)
    with features.disable_adapter(), torch.no_grad():
        assert not torch.equal(features(input_ids()).last_hidden_state, twice[0])


def test_blocks_of_other_layers(tmp_path):
    """Conv1D with biases in GPT-2: the gates sum to one, so W0's bias counts once."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    names = ["mlp.c_fc", "mlp.c_proj"]
    model = wrapped("ffn", base, target_modules=names)
    block = model.base_model.model.transformer.h[0].mlp
    x = torch.randn(2, 3, 16)
    gates = block.mixture_router.route("default", x.reshape(-1, 16)).gates
    expected = torch.zeros(6, 16)
    for e in range(3):
        y = x.reshape(-1, 16)
        for layer, after in ((block.c_fc, block.act), (block.c_proj, nn.Identity())):
            delta = 3 * layer.moe_lora_B["default"][e] @ layer.moe_lora_A["default"][e]
            y = after(layer.base_layer(y) + y @ delta.T)
        expected += gates[:, [e]] * y
    torch.testing.assert_close(block(x).reshape(-1, 16), expected)
    with pytest.raises(ConfigError, match="c_proj: has a bias, so the gates must sum to 1"):
        wrapped("ffn", GPT2LMHeadModel(base.config), target_modules=names, norm_topk_prob=False)


def test_base_down_is_computed_once_on_the_gated_sum():
    model = wrapped("ffn_dense")
    seen = []
    for layer in model.base_model.model.model.layers[0].mlp.children():
        if hasattr(layer, "base_layer"):
            layer.base_layer.register_forward_hook(lambda m, args, o: seen.append(tuple(args[0].shape)))
    logits(model)
    assert seen == [(2, 7, 32), (2, 7, 32), (2, 7, 48)]
