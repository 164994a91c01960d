"""What routers beside the layers cannot do is refused with a reason; and the limits of what they can."""

import peft
import pytest
import torch
from test_peft_support import (
    FIELDS,
    THIRD_PARTY_WARNINGS,
    config,
    every_scope,
    input_ids,
    logits,
    out,
    random_,
    tiny_llama,
    wrapped,
)
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from moe_lora_interop.errors import ConfigError
from moe_lora_interop.peft_tuner.router import MoeLoraLayer
from moe_lora_interop.peft_tuner.shared_router import SharedRouter

pytestmark = THIRD_PARTY_WARNINGS


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


@every_scope
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


@every_scope
def test_merging_is_refused(name):
    model = wrapped(name)
    for verb in ("merge_and_unload", "merge_adapter", "unmerge_adapter"):
        with pytest.raises(ValueError, match="a MOE_LORA adapter cannot be merged"):
            getattr(model.base_model, verb)()
    assert any(isinstance(m, SharedRouter) for m in model.modules())
