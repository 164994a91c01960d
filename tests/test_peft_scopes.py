"""Routers at feed-forward blocks, at the model and for tasks do all that PEFT does with an adapter, or say why not."""

import copy
import json
import pickle

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_peft_support import (
    THIRD_PARTY_WARNINGS,
    config,
    input_ids,
    logits,
    tiny_classifier,
    tiny_llama,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

import interop
import interop.peft_tuner as tuner
import moe_lora_jax as mlj
from interop.dialects.native import NATIVE
from interop.errors import CheckpointError, ConfigError
from interop.peft_tuner.router import MoeLoraLayer
from interop.peft_tuner.shared_router import SharedRouter

pytestmark = THIRD_PARTY_WARNINGS

MLP = ["gate_proj", "up_proj", "down_proj"]
TASKS = {"router_input": "task", "num_tasks": 4}
FIELDS = {
    "ffn": {"scope": "ffn", "target_modules": MLP, "router_bias": True, "top_k": 2},
    "ffn_dense": {"scope": "ffn", "target_modules": [*MLP, "q_proj"], "num_experts_pattern": {"q_proj": 1}},
    "ffn_adaptive": {"scope": "ffn", "target_modules": ["up_proj"], "threshold": 0.4, "adaptive_threshold": True},
    "model": {"scope": "model", "top_k": 2},
    "layerwise": {"scope": "model", "router_depth": 2, "router_hidden_size": 5, "router_bias": True, "layerwise": True},
    "embedding": {"scope": "model", **TASKS, "task_embedding_dim": 5},
    "table": {"scope": "model", **TASKS, "router_depth": 0},
    "poly": {**TASKS, "router_depth": 0, "mix": "weights", "n_splits": 2, "scoring_func": "sigmoid"},
}
IDS = [3, 1]
each = pytest.mark.parametrize("name", FIELDS)
hidden_only = pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if "num_tasks" not in f])
LOADS = pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu"])


def random_(model: nn.Module, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "moe_lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def wrapped(name: str, base: nn.Module | None = None, adapter: str = "default", **more) -> peft.PeftModel:
    model = tiny_llama() if base is None else base
    return random_(peft.get_peft_model(model, config(**(FIELDS[name] | more)), adapter_name=adapter))


def out(model: nn.Module, name: str, ids: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    ids = input_ids() if ids is None else ids
    with torch.set_grad_enabled(kwargs.pop("grad", False)):
        if "num_tasks" not in FIELDS[name]:
            return model(ids, **kwargs).logits
        with tuner.task_routing(model, IDS):
            return model(ids, **kwargs).logits


def loaded(path, base: nn.Module | None = None, **kwargs) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(tiny_llama() if base is None else base, path, **kwargs)


# --- files ------------------------------------------------------------------------------------------------------------


@each
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


@each
def test_the_file_is_a_native_one(tmp_path, name):
    wrapped(name).save_pretrained(tmp_path)
    assert interop.detect(tmp_path) == NATIVE.name
    assert interop.read(tmp_path).tensors  # which has every tensor that the config implies, and no other


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


@each
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
    assert interop.read(tmp_path).config.module_order == [f"model.layers.{i}.{m}" for i in (0, 1) for m in layer]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@each
def test_half_precision_bases(tmp_path, name, dtype, autocast):
    model = peft.get_peft_model(tiny_llama(dtype), config(**FIELDS[name]), autocast_adapter_dtype=autocast)
    random_(model).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32 if autocast else dtype}
    again = loaded(tmp_path, tiny_llama(dtype), autocast_adapter_dtype=autocast)
    assert out(again, name).dtype == dtype and torch.equal(out(again, name), out(model, name))


# --- verbs ------------------------------------------------------------------------------------------------------------


@each
def test_only_the_adapter_trains_and_all_of_it(name):
    model = wrapped(name)
    out(model.train(), name, grad=True).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == ("moe_lora_" in key), key
        assert (parameter.grad is not None) == ("moe_lora_" in key), key
    assert model.get_model_status().requires_grad == {"default": True}


@each
@pytest.mark.parametrize("is_trainable", [True, False])
def test_is_trainable(tmp_path, name, is_trainable):
    wrapped(name).save_pretrained(tmp_path)
    again = loaded(tmp_path, is_trainable=is_trainable)
    assert {p.requires_grad for n, p in again.named_parameters() if "moe_lora_" in n} == {is_trainable}


@each
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


@each
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


@each
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


@each
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


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ffn", "model", "layerwise"])
def test_generate_equals_jax(tmp_path, name):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = wrapped(name, base)
    model.save_pretrained(tmp_path / "adapter")
    kwargs = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(input_ids=input_ids(), use_cache=False, **kwargs)
    jax_model = mlj.load_adapter(mlj.load_base_model(tmp_path / "base"), tmp_path / "adapter")
    likeliest = jax_model(jnp.asarray(found[:, :-1])).argmax(-1)
    np.testing.assert_array_equal(found[:, 7:], likeliest[:, 6:])
    if name == "ffn":
        assert torch.equal(model.generate(input_ids=input_ids(), **kwargs), found)


def test_two_passes_refuse_a_cache_which_would_hold_only_one():
    model = wrapped("model")
    with pytest.raises(ValueError, match=r"'default' has a router of the whole model.*pass use_cache=False"):
        model.generate(input_ids=input_ids(), max_new_tokens=2, pad_token_id=0)
    with torch.no_grad():
        first = model(input_ids(), use_cache=True)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(input_ids(), past_key_values=first.past_key_values)


@pytest.mark.parametrize("name", ["poly", "embedding"])
def test_generate_by_task_with_and_without_cache(name):
    model = wrapped(name)
    kwargs = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with model.base_model.task_routing(IDS):
        cached, found = (model.generate(input_ids=input_ids(), use_cache=c, **kwargs) for c in (True, False))
    assert torch.equal(cached, found)
    assert not torch.equal(tiny_llama().generate(input_ids=input_ids(), **kwargs), found)


@pytest.mark.parametrize("name", ["poly", "embedding"])
def test_beams_take_the_task_of_their_sample(name):
    model = wrapped(name)
    kwargs = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with model.base_model.task_routing(IDS):
        both = model.generate(input_ids=input_ids(), **kwargs)
    for i, task in enumerate(IDS):
        with model.base_model.task_routing([task]):
            assert torch.equal(model.generate(input_ids=input_ids()[[i]], **kwargs), both[[i]])


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ffn", "model", "embedding"])
def test_injection_without_a_peft_model_is_refused(tmp_path, name):
    wrapped(name).save_pretrained(tmp_path)
    for attempt in (
        lambda: peft.inject_adapter_in_model(config(**FIELDS[name]), tiny_llama()),
        lambda: tiny_llama().load_adapter(tmp_path),
    ):
        with pytest.raises(
            ConfigError, match=r"scope (ffn|model) has routers beside the layers.*PeftModel.from_pretrained"
        ):
            attempt()


def test_a_per_layer_task_table_can_be_injected():
    model = random_(peft.inject_adapter_in_model(config(**FIELDS["poly"]), tiny_llama()))
    assert torch.equal(out(model, "poly"), out(wrapped("poly"), "poly"))


@each
def test_mixed_batches_are_refused_but_run_beside_it(name):
    model = wrapped(name)
    model.add_adapter("linear", config(target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"adapter_names: adapter 'default' has scope .*one batch for each adapter"):
        model(input_ids(), adapter_names=["default", "__base__"])
    mixed = logits(random_(model), adapter_names=["linear", "__base__"])
    torch.testing.assert_close(mixed[1], logits(tiny_llama())[1])
    model.set_adapter("linear")
    torch.testing.assert_close(mixed[0], logits(model)[0])


def test_adapters_active_together():
    model = wrapped("ffn")
    model.add_adapter("attention", config(target_modules=["q_proj"]))
    model.add_adapter("linear", config(target_modules=["down_proj"]))
    model.add_adapter("other", config(**FIELDS["ffn"]))
    random_(model)
    separate = out(model, "ffn")
    model.base_model.set_adapter(["default", "attention"])
    assert not torch.equal(out(model, "ffn"), separate)
    for other in ("linear", "other"):
        for pair in (["default", other], [other, "default"]):
            model.base_model.set_adapter(pair)
            with pytest.raises(
                ValueError, match=rf"'default', '{other}' are active together on one feed-forward block"
            ):
                out(model, "ffn")


def test_model_routers_add_up():
    model = wrapped("model")
    model.add_adapter("layerwise", config(**FIELDS["layerwise"]))
    random_(model)
    one = out(model, "model")
    model.base_model.set_adapter(["default", "layerwise"])
    assert not torch.equal(out(model, "model"), one)
    model.base_model.set_adapter("default")
    assert torch.equal(out(model, "model"), one)


def test_a_layer_called_by_itself():
    model = wrapped("ffn")
    with pytest.raises(RuntimeError, match="was called by itself: call the whole model"):
        model.base_model.model.model.layers[0].mlp.up_proj(torch.zeros(1, 32))
    with pytest.raises(RuntimeError, match="was called by itself"):
        wrapped("model").base_model.model.model.layers[0].self_attn.q_proj(torch.zeros(1, 32))


def opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(vocab_size=97, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2)
    )


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        (opt, {"scope": "ffn", "target_modules": ["fc1", "fc2"]}, "self_attn has linear layers of its own"),
        (tiny_llama, {"scope": "ffn", "target_modules": ["o_proj"]}, "self_attn: found the layers .*expected several"),
        (t5, {"scope": "model", "target_modules": ["wi"]}, "T5ForConditionalGeneration: an encoder-decoder"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4)),
            {"scope": "model", "target_modules": ["0"]},
            "Sequential: expected a transformers model",
        ),
        (tiny_llama, {"mix": "weights", "n_splits": 3}, "q_proj: sizes 32 -> 32, expected multiples of n_splits 3"),
        (
            tiny_llama,
            FIELDS["layerwise"] | {"module_order": ["model.layers.0.self_attn.q_proj", "lm_head"]},
            r"module_order: without .*q_proj.* that is routed and with \['lm_head'\] that is not",
        ),
    ],
)
def test_configs_that_do_not_fit_the_model_change_nothing(base, fields, message):
    model = base()
    with pytest.raises(ConfigError, match=message):
        peft.get_peft_model(model, config(**fields))
    assert not any(isinstance(m, MoeLoraLayer) for m in model.modules())


@pytest.mark.parametrize("name", ["mixture_router", "moe_lora_router", "gate_proj"])
def test_reserved_adapter_names(name):
    with pytest.raises(ValueError, match="also a part of this model's parameter names"):
        wrapped("ffn", adapter=name)


@each
def test_merging_is_refused(name):
    model = wrapped(name)
    for verb in ("merge_and_unload", "merge_adapter", "unmerge_adapter"):
        with pytest.raises(ValueError, match="a MOE_LORA adapter cannot be merged"):
            getattr(model.base_model, verb)()
    assert any(isinstance(m, SharedRouter) for m in model.modules())
