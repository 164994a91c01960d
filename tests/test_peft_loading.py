"""Files: the native keys, exact round trips, dtypes, and what is said when a tensor is missing or wrong."""

import json

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_peft_support import THIRD_PARTY_WARNINGS, config, input_ids, logits, tiny_classifier, tiny_llama

from moe_lora_interop.dialects.native import NATIVE
from moe_lora_interop.errors import CheckpointError, ConfigError

pytestmark = THIRD_PARTY_WARNINGS

EVERYTHING = {"router_bias": True, "threshold": 0.5, "adaptive_threshold": True, "norm_topk_prob": False}
LOADS = pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu"])


def saved(path, dtype=torch.float32, autocast=True, **fields) -> peft.PeftModel:
    """A random adapter (routers too), saved to `path`."""
    model = peft.get_peft_model(tiny_llama(dtype), config(**fields), autocast_adapter_dtype=autocast)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "moe_lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)
    return model.eval()


def loaded(path, dtype=torch.float32, **kwargs) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(tiny_llama(dtype), path, **kwargs)


def tensors(path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize(
    ("fields", "roles"),
    [
        ({}, {"lora_A", "lora_B", "router"}),
        ({"num_experts": 1}, {"lora_A", "lora_B"}),
        ({"router_bias": True, "top_k": 1}, {"lora_A", "lora_B", "router", "router_bias"}),
        (EVERYTHING, {"lora_A", "lora_B", "router", "router_bias", "threshold", "threshold_bias"}),
    ],
    ids=["default", "one", "bias", "everything"],
)
@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_keys_are_exactly_those_of_the_native_table(tmp_path, fields, roles, name):
    model = peft.get_peft_model(tiny_llama(), config(**fields), adapter_name=name)
    model.save_pretrained(tmp_path)
    stored = tensors(tmp_path if name == "default" else tmp_path / name)
    modules = [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")]
    wanted = {rule.key.format(module=m): rule for m in modules for rule in NATIVE.rules if rule.role in roles}
    assert stored.keys() == wanted.keys()
    for key, rule in wanted.items():
        assert stored[key].ndim == len(rule.axes.split())
        assert stored[key].dtype == torch.float32


@LOADS
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 2},
        {"num_experts": 1},
        EVERYTHING,
        {"shared_lora_A": True, "scoring_func": "sigmoid"},
        {"r": [1, 2, 4], "lora_alpha": [1.0, 2.0, 3.0]},
        {"num_experts_pattern": {"q_proj": 1, "down_proj": 5}, "top_k_pattern": {"layers.1.mlp.down_proj": 2}},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"], "router_temperature": 0.3},
        {"target_modules": r".*\.(q|v)_proj"},
        {"layers_to_transform": [1]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_save_load_save(tmp_path, fields, low_cpu_mem_usage):
    model = saved(tmp_path / "a", **fields)
    again = loaded(tmp_path / "a", low_cpu_mem_usage=low_cpu_mem_usage)
    # low_cpu_mem_usage leaves the tensors in the file's memory, whose alignment can change the last bit of a product
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6 if low_cpu_mem_usage else 0, rtol=0)
    again.save_pretrained(tmp_path / "b")
    assert_same_tensors(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    a, b = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in "ab")
    assert a == b


@LOADS
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("file", [torch.float32, torch.bfloat16, torch.float16])
def test_loading_never_rounds(tmp_path, base, file, low_cpu_mem_usage):
    saved(tmp_path, **EVERYTHING)
    stored = {k: v.to(file) for k, v in tensors(tmp_path).items()}
    save_file(stored, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    upcast = get_peft_model_state_dict(loaded(tmp_path, base, low_cpu_mem_usage=low_cpu_mem_usage))
    assert_same_tensors(upcast, {k: v.float() for k, v in stored.items()})
    kept = loaded(tmp_path, base, low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=False)
    expected = torch.promote_types(base, file)
    assert_same_tensors(get_peft_model_state_dict(kept), {k: v.to(expected) for k, v in stored.items()})
    assert logits(kept).dtype == base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_saves_and_reloads_bit_equal_without_autocast(tmp_path, dtype):
    model = saved(tmp_path / "a", dtype, autocast=False, **EVERYTHING)
    again = loaded(tmp_path / "a", dtype, autocast_adapter_dtype=False)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "b")
    assert {t.dtype for t in tensors(tmp_path / "b").values()} == {dtype}
    assert_same_tensors(tensors(tmp_path / "a"), tensors(tmp_path / "b"))


def break_file(path, change) -> None:
    stored = tensors(path)
    change(stored)
    save_file(stored, path / "adapter_model.safetensors", {"format": "pt"})


PREFIX = "base_model.model.model.layers.1"


def drop_and_bend(stored):
    del stored[f"{PREFIX}.self_attn.q_proj.moe_lora_router.weight"]
    del stored[f"{PREFIX}.mlp.down_proj.moe_lora_A"]
    stored[f"{PREFIX}.mlp.down_proj.moe_lora_B"] = torch.zeros(3, 32, 5)
    stored[f"{PREFIX}.mlp.down_proj.lora_A.weight"] = torch.zeros(2, 48)


PROBLEMS = (
    f"{PREFIX}.self_attn.q_proj.moe_lora_router.weight: missing, expected shape [3, 32]",
    f"{PREFIX}.mlp.down_proj.moe_lora_A: missing, expected shape [3, 2, 48]",
    f"{PREFIX}.mlp.down_proj.moe_lora_B: shape [3, 32, 5], expected [3, 32, 2]",
    f"{PREFIX}.mlp.down_proj.lora_A.weight: unexpected tensor of shape [2, 48]",
)


@LOADS
def test_missing_unexpected_and_wrongly_shaped_tensors_are_all_listed(tmp_path, low_cpu_mem_usage):
    saved(tmp_path)
    break_file(tmp_path, drop_and_bend)
    with pytest.raises(CheckpointError) as error:
        loaded(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, adapter_name="mine")
    assert set(error.value.problems) == set(PROBLEMS)
    assert "adapter 'mine'" in str(error.value)


def test_the_same_through_every_other_door(tmp_path):
    model = saved(tmp_path)
    before = get_peft_model_state_dict(model)
    broken = dict(before)
    drop_and_bend(broken)
    with pytest.raises(CheckpointError) as error:
        set_peft_model_state_dict(model, broken)
    assert set(error.value.problems) == set(PROBLEMS)
    assert_same_tensors(get_peft_model_state_dict(model), before)  # nothing was copied
    break_file(tmp_path, drop_and_bend)
    with pytest.raises(CheckpointError, match="missing, expected shape"):
        model.load_adapter(tmp_path, "second")
    injected = peft.inject_adapter_in_model(config(), tiny_llama())
    with pytest.raises(CheckpointError) as error:
        set_peft_model_state_dict(injected, broken)
    assert set(error.value.problems) == set(PROBLEMS)
    with pytest.raises(CheckpointError, match="shape"):
        set_peft_model_state_dict(model, broken, ignore_mismatched_sizes=True)


def test_a_missing_module_to_save_is_loud(tmp_path):
    saved(tmp_path, modules_to_save=["lm_head"])
    break_file(tmp_path, lambda stored: stored.pop("base_model.model.lm_head.weight"))
    with pytest.raises(KeyError, match="base_model.model.lm_head.weight"):  # PEFT's own, before the tuner is asked
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version: found 3, this release reads up to 2"),
        ({"gate_noise": 0.1}, "gate_noise: unknown field with value 0.1"),
        ({"top_k": 9}, "top_k: found 9, expected at most num_experts = 3"),
        ({"target_modules": ["q_porj", "down_proj"]}, "'q_porj': .*did you mean q_proj"),
        (
            {"top_k": 3, "num_experts_pattern": {"q_proj": 2}},
            "q_proj: top_k: found 3, expected at most num",
        ),
        ({"r": 4}, "shape"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path, change, message):
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((ConfigError, CheckpointError), match=message):
        loaded(tmp_path)


def test_state_dicts_move_between_adapters_and_models(tmp_path):
    model = saved(tmp_path, top_k=2)
    state = get_peft_model_state_dict(model)
    other = peft.get_peft_model(tiny_llama(), config(top_k=2), adapter_name="other").eval()
    result = set_peft_model_state_dict(other, state, adapter_name="other")
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))
    injected = peft.inject_adapter_in_model(config(top_k=2), tiny_llama()).eval()
    set_peft_model_state_dict(injected, state)
    assert torch.equal(logits(injected), logits(model))
    again = {f"base_model.model.{k}": v for k, v in get_peft_model_state_dict(injected).items()}
    assert_same_tensors(again, state)


def test_injection_by_the_keys_of_a_state_dict(tmp_path):
    model = saved(tmp_path)
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    injected = peft.inject_adapter_in_model(config(), tiny_llama(), state_dict=state).eval()
    set_peft_model_state_dict(injected, state)
    assert torch.equal(logits(injected), logits(model))


def test_pickled_weights_load_too(tmp_path):
    model = peft.get_peft_model(tiny_llama(), config())
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(logits(loaded(tmp_path)), logits(model))


def test_a_classifier_head_is_saved_with_the_adapter(tmp_path):
    model = peft.get_peft_model(tiny_classifier(), config(task_type="SEQ_CLS")).eval()
    torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    assert "base_model.model.score.weight" in tensors(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_classifier(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids()).logits, model(input_ids()).logits)
