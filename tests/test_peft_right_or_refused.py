"""What a file, a warning or an error must not pass over in silence."""

import peft
import pytest
import torch
from test_peft_support import THIRD_PARTY_WARNINGS, config, logits, tiny_llama, wrapped
from torch import nn

import moe_lora_interop.peft_tuner as tuner
from moe_lora_interop import CheckpointError, ConfigError, MoeLoraConfig
from moe_lora_interop.peft_tuner.router import RouterLinear

pytestmark = THIRD_PARTY_WARNINGS


# --- routers of another class ----------------------------------------------------------------------------------------


class Sharper(RouterLinear):
    """A user's own rule."""

    def forward(self, x):
        return 3 * super().forward(x)


def first(model, name):
    return next(m for m in model.modules() if "default" in getattr(m, name, {}))


def swapped(name, container, new):
    model = wrapped(name)
    entries = getattr(first(model, container), container)
    if isinstance(entries["default"], nn.ModuleList):
        entries["default"][0] = new(entries["default"][0])
    else:
        entries["default"] = new(entries["default"])
    return model


def sharper(old):
    return Sharper(old.in_features, old.out_features, bias=old.bias is not None)


def torch_linear(old):
    return nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)


def parametrized(old):
    return torch.nn.utils.parametrizations.weight_norm(old)


def patched(old):
    old.forward = lambda x: torch.zeros(*x.shape[:-1], old.out_features)
    return old


@pytest.mark.parametrize(
    ("name", "container", "new", "message"),
    [
        (
            "ffn",
            "moe_lora_router",
            sharper,
            r"layers\.0\.mlp\.mixture_router\.moe_lora_router\.default: found .*Sharper",
        ),
        ("model", "moe_lora_router", sharper, r"mixture_router\.moe_lora_router\.default: found .*Sharper"),
        ("ffn_adaptive", "moe_lora_threshold", sharper, r"moe_lora_threshold\.default: found .*Sharper"),
        ("ffn", "moe_lora_router", torch_linear, r"found torch\.nn\.modules\.linear\.Linear, expected .*RouterLinear"),
        ("ffn", "moe_lora_router", parametrized, "found .*ParametrizedRouterLinear"),
        ("ffn", "moe_lora_router", patched, "found .*RouterLinear with a forward of its own"),
        ("table", "moe_lora_task_embedding", lambda old: nn.Embedding(*old.weight.shape), "found .*sparse.Embedding"),
    ],
)
def test_a_router_of_another_class_is_not_saved(tmp_path, name, container, new, message):
    model = swapped(name, container, new)
    with pytest.raises(CheckpointError, match=message):
        model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        peft.get_peft_model_state_dict(model)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_layer_of_another_class_is_not_saved():
    model = wrapped("ffn")
    layer = first(model, "moe_lora_A")
    layer.__class__ = type("Mine", (type(layer),), {})
    with pytest.raises(CheckpointError, match=r"mlp\.gate_proj: found .*Mine, expected .*layer\.Linear"):
        peft.get_peft_model_state_dict(model)


def test_another_adapter_is_saved_as_ever(tmp_path):
    model = swapped("ffn", "moe_lora_router", sharper)
    model.add_adapter("plain", config(target_modules=["q_proj"]))
    expected = peft.get_peft_model_state_dict(model, adapter_name="plain")
    model.save_pretrained(tmp_path, selected_adapters=["plain"])
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    model.set_adapter("plain")
    assert torch.equal(logits(again), logits(model)) and expected


# --- targets ---------------------------------------------------------------------------------------------------------


def gemma3():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    text = heads | {"vocab_size": 97, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8}
    vision = heads | {"image_size": 8, "patch_size": 4, "vision_use_head": True}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def test_all_linear_leaves_out_what_nobody_calls(tmp_path):
    """A layer of nn.MultiheadAttention in the vision tower's head; stock LoRA wraps it, without effect."""
    unheard = "model.vision_tower.head.attention.out_proj"
    lora = peft.get_peft_model(gemma3(), peft.LoraConfig(target_modules="all-linear"))
    model = peft.get_peft_model(gemma3(), config(target_modules="all-linear")).eval()
    assert {*model.base_model.targeted_module_names, unheard} == set(lora.base_model.targeted_module_names)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(gemma3(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(TypeError, match=rf"without calling it.*exclude_modules=\['{unheard}'\]"):
        peft.get_peft_model(gemma3(), config(target_modules=["out_proj"]))
    named = peft.get_peft_model(gemma3(), config(target_modules=["out_proj"], exclude_modules=[unheard]))
    assert len(named.base_model.targeted_module_names) == 2


@pytest.mark.parametrize("make", [MoeLoraConfig, tuner.MoeLoraConfig])
@pytest.mark.parametrize(
    ("wrong", "meant"), [("n_experts", "num_experts"), ("alpha", "lora_alpha"), ("targets", "target_modules")]
)
def test_a_wrong_keyword(make, wrong, meant):
    with pytest.raises(ConfigError, match=rf"{wrong}: unknown field.*; did you mean {meant}\?"):
        make(**{wrong: 4})


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"exclude_modules: found \['q_proj'\]"),
        ({"target_modules": "all-linear", "exclude_modules": ".*"}, r"exclude_modules: found '\.\*'"),
        ({"target_modules": ".*q_proj", "exclude_modules": ["q_proj"]}, "exclude_modules: found .*"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"layers_to_transform: found \[7\]"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, r"modules_to_save: found \['lm_head'\]"),
    ],
)
def test_a_field_that_leaves_no_target(fields, field):
    with pytest.raises(ConfigError, match=rf"{field}, which leaves none of the \d+ layers that target_modules"):
        peft.get_peft_model(tiny_llama(), config(**fields))


# --- names of adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["0", "7", "a.b", "layers", "q_proj", "norm", "embed_tokens", "keys", "train", "ref."])
@pytest.mark.parametrize("scope", ["linear", "ffn"])
def test_adapter_names_that_would_lose_parameters(tmp_path, name, scope):
    """peft#3584: PEFT finds the parameters of other adapters by looking for their names between the dots of a key."""
    fields = {"scope": scope, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    peft.get_peft_model(tiny_llama(), config(**fields)).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    attempts = [
        lambda: peft.get_peft_model(tiny_llama(), config(**fields), adapter_name=name),
        lambda: peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name=name),
        lambda: model.add_adapter(name, config(**fields)),
        lambda: model.load_adapter(tmp_path, name),
    ]
    if scope == "linear":
        attempts.append(lambda: peft.inject_adapter_in_model(config(**fields), tiny_llama(), adapter_name=name))
    for attempt in attempts:
        with pytest.raises(ValueError, match="adapter name .*Choose another name"):
            attempt()
    assert list(model.peft_config) == ["default"]


def test_shared_state_is_said():
    """peft#3667. The class says no, because adapters of scope linear can be injected; others refuse for themselves."""
    assert not tuner.MoeLoraModel.uses_shared_state
    for name, shared in {"poly": False, "ffn": True, "model": True, "embedding": True}.items():
        assert wrapped(name).base_model.uses_shared_state is shared
