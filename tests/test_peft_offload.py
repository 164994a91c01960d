"""Bases that accelerate offloads to the CPU or to disk: the same numbers as in memory."""

from contextlib import nullcontext

import accelerate
import peft
import pytest
import torch
from test_peft_support import (
    FIELDS,
    IDS,
    THIRD_PARTY_WARNINGS,
    config,
    input_ids,
    logits,
    random_,
    tiny_llama,
)
from transformers import AutoModelForCausalLM

import moe_lora_interop.peft_tuner as tuner

pytestmark = THIRD_PARTY_WARNINGS

FIELDS = FIELDS | {"linear": {"threshold": 0.4, "adaptive_threshold": True}}
SCOPES = ["linear", "ffn_adaptive", "layerwise", "embedding"]
MAP = {"embed_tokens": "cpu", "rotary_emb": "cpu", "norm": "cpu", "layers.0": "cpu", "layers.1": "disk"}
MAP = {f"model.{name}": device for name, device in MAP.items()} | {"lm_head": "cpu"}
MEMORY = {"cpu": "60KB"}
"""Less than the tiny model has."""


def out(model, name):
    """Logits, by task where the kind of adapter needs it."""
    with tuner.task_routing(model, IDS) if "num_tasks" in FIELDS[name] else nullcontext():
        return model(input_ids()).logits


def assert_same(found, expected):
    """To rounding: torch.matmul takes another path where a factor can be trained."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """PEFT 0.21 writes the files of a disk-offloaded model below the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["disk", "auto", "cpu_offload", "disk_offload"])
def way(request):
    return request.param


def offloaded(way, base_dir, path):
    """A base, offloaded in one of the ways; and what PeftModel.from_pretrained needs for it."""
    folder = {"offload_folder": str(path / "folder")}
    if way == "disk":
        device_map = {f"base_model.model.{name}": device for name, device in MAP.items()}
        base = AutoModelForCausalLM.from_pretrained(base_dir, device_map=dict(MAP), **folder)
        return base, folder | {"device_map": device_map}
    if way == "auto":
        base = AutoModelForCausalLM.from_pretrained(base_dir, device_map="auto", max_memory=MEMORY, **folder)
        return base, folder | {"max_memory": MEMORY}
    if way == "cpu_offload":
        return accelerate.cpu_offload(tiny_llama()), {}
    return accelerate.disk_offload(tiny_llama(), str(path / "folder")), {}


def dispatch(way, model, path):
    """Offloads a model that has its adapter already."""
    if way == "cpu_offload":
        return accelerate.cpu_offload(model)
    if way == "disk_offload":
        return accelerate.disk_offload(model, str(path))
    device_map = {f"base_model.model.{name}": device for name, device in MAP.items()}
    if hasattr(model.base_model.model, "mixture_router"):
        device_map["base_model.model.mixture_router"] = "disk"
    return accelerate.dispatch_model(model, device_map, offload_dir=str(path))


def saved(name, path, **changes):
    """An adapter in a directory, and its logits on a base in memory."""
    model = peft.get_peft_model(tiny_llama(), config(**FIELDS[name] | changes))
    if "init_lora_weights" not in changes:
        random_(model)
    model.save_pretrained(path)
    return path, out(model.eval(), name)


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_on_an_offloaded_base(tmp_path, base_dir, way, name, low_cpu_mem_usage):
    adapter, expected = saved(name, tmp_path / "adapter")
    base, kwargs = offloaded(way, base_dir, tmp_path)
    model = peft.PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
    assert any(p.is_meta for p in model.parameters())  # the base is still offloaded, the adapter is not
    assert not any(p.is_meta for n, p in model.named_parameters() if "moe_lora_" in n)
    assert_same(out(model, name), expected)
    assert_same(out(model, name), expected)


@pytest.mark.parametrize("name", SCOPES)
def test_an_identity_is_the_base(tmp_path, base_dir, way, name):
    adapter, _ = saved(name, tmp_path / "adapter", init_lora_weights=True)
    base, kwargs = offloaded(way, base_dir, tmp_path)
    assert_same(out(peft.PeftModel.from_pretrained(base, adapter, **kwargs), name), logits(tiny_llama()))


@pytest.mark.parametrize("name", SCOPES)
def test_a_model_offloaded_with_its_adapter(tmp_path, way, name):
    adapter, expected = saved(name, tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(tiny_llama(), adapter, is_trainable=True).eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    dispatch(way, model, tmp_path / "folder")
    held = {id(p) for p in model.parameters() if p.requires_grad}
    assert_same(out(model, name), expected)
    assert_same(out(model, name), expected)
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(held) == len(optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("name", SCOPES)
def test_an_offloaded_model_saves_its_adapter(tmp_path, way, name):
    """Before any forward, when accelerate has the values."""
    adapter, _ = saved(name, tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(tiny_llama(), adapter)
    dispatch(way, model, tmp_path / "folder").save_pretrained(tmp_path / "again")
    files = [path / "adapter_model.safetensors" for path in (adapter, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", SCOPES)
def test_more_adapters_on_an_offloaded_model(tmp_path, base_dir, way, name):
    adapter, expected = saved(name, tmp_path / "adapter")
    first, of_first = saved("linear", tmp_path / "first")
    base, kwargs = offloaded(way, base_dir, tmp_path)
    model = peft.PeftModel.from_pretrained(base, first, **kwargs)
    model.load_adapter(adapter, "second")
    assert_same(logits(model), of_first)
    model.set_adapter("second")
    assert_same(out(model, name), expected)
    values = {k: v.clone() for k, v in peft.get_peft_model_state_dict(model, adapter_name="second").items()}
    for n, parameter in model.named_parameters():
        if ".second" in n:
            torch.nn.init.normal_(parameter)
    assert not torch.equal(out(model, name), expected)
    peft.set_peft_model_state_dict(model, values, adapter_name="second")
    assert_same(out(model, name), expected)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert_same(logits(model), of_first)
    assert_same(logits(model.unload()), logits(tiny_llama()))


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("first", ["adapter", "offload"])
def test_training(tmp_path, base_dir, way, name, first):
    """Every parameter of the adapter is trained, also those of layers that are offloaded."""

    def step(model):
        trained = {n.replace("base_model.model.", ""): p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            out(model.train(), name).square().sum().backward()
            optimizer.step()
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    adapter, _ = saved(name, tmp_path / "adapter")
    expected = step(peft.PeftModel.from_pretrained(tiny_llama(), adapter, is_trainable=True))
    if first == "offload":
        base, kwargs = offloaded(way, base_dir, tmp_path)
        model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True, **kwargs)
    else:
        model = peft.PeftModel.from_pretrained(tiny_llama(), adapter, is_trainable=True)
        dispatch(way, model, tmp_path / "folder")
    found = step(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("linear", r"layers\.0\.self_attn\.q_proj\.moe_lora_A"),
        ("ffn", r"layers\.0\.mlp\.moe_lora_router"),
        ("embedding", "moe_lora_(router|task_embedding)"),
    ],
)
def test_a_parameter_without_a_value_is_named(name, place):
    model = peft.PeftModel(tiny_llama(), config(**FIELDS[name]), low_cpu_mem_usage=True)
    with pytest.raises(RuntimeError, match=rf"{place}: the parameter of adapter 'default' is on the meta device"):
        out(model, name)


def test_the_losses_of_an_offloaded_model(tmp_path):
    fields = FIELDS["linear"] | {"router_aux_loss_coef": 0.5}
    losses = []
    for offload in (False, True):
        model = random_(peft.get_peft_model(tiny_llama(), config(**fields)))
        if offload:
            accelerate.disk_offload(model, str(tmp_path))
        model.train()(input_ids())
        losses.append(model.base_model.moe_lora_aux_loss())
    assert torch.equal(*losses)
    assert losses[0].item() > 0
