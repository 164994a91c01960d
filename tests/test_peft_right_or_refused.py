"""What a file, a warning or an error must not pass over in silence."""

import peft
import pytest
import torch
from test_peft_support import THIRD_PARTY_WARNINGS, config, logits, tiny_llama, wrapped
from torch import nn

from moe_lora_interop import CheckpointError
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
