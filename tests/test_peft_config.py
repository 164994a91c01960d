"""The PEFT twin of the config: same fields, same defaults, same refusals."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft.utils import PeftType
from test_peft_support import config

import moe_lora_interop.config.adapter_config
import moe_lora_interop.peft_tuner as tuner
from moe_lora_interop.errors import ConfigError


def test_same_fields_and_defaults_as_the_neutral_config():
    neutral = {f.name: f for f in dataclasses.fields(moe_lora_interop.MoeLoraConfig)}
    twin = {f.name: f for f in dataclasses.fields(tuner.MoeLoraConfig)}
    assert twin.keys() == neutral.keys()
    for name, field in neutral.items():
        assert (twin[name].default, twin[name].default_factory) == (field.default, field.default_factory), name
    assert tuner.MoeLoraConfig(peft_version="x").neutral == moe_lora_interop.MoeLoraConfig(peft_version="x")


def test_registered_once_and_reachable_by_every_lookup_of_the_enum():
    assert PeftType("MOE_LORA") is PeftType.MOE_LORA is PeftType["MOE_LORA"]
    assert "MOE_LORA" in list(PeftType)
    assert PeftType.MOE_LORA.value == "MOE_LORA" and PeftType.MOE_LORA.name == "MOE_LORA"
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MOE_LORA] is tuner.MoeLoraModel
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.MOE_LORA] == "moe_lora_"
    for copied in (copy.deepcopy(PeftType.MOE_LORA), pickle.loads(pickle.dumps(PeftType.MOE_LORA))):
        assert copied is PeftType.MOE_LORA


def test_importing_twice_is_harmless_and_never_imports_jax():
    code = (
        "import sys, importlib; sys.modules['jax'] = None; import moe_lora_interop.peft_tuner as t; "
        "n = len(t.PeftType); importlib.reload(t); assert len(t.PeftType) == n; "
        "assert not any(m.split('.')[0] in ('flax', 'moe_lora_jax') for m in sys.modules)"
    )
    root = Path(moe_lora_interop.config.adapter_config.__file__).parents[1]
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=root)


def test_target_names_are_sets_as_peft_expects_and_lists_in_the_file(tmp_path):
    c = tuner.MoeLoraConfig(target_modules=["v", "q", "v"], exclude_modules=("x",), task_type="CAUSAL_LM")
    assert c.target_modules == {"q", "v"} and c.exclude_modules == {"x"}
    assert c.neutral.target_modules == ["q", "v"]
    c.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == ["q", "v"] and written["peft_type"] == "MOE_LORA"
    assert moe_lora_interop.MoeLoraConfig.from_dict(written) == c.neutral


@pytest.mark.parametrize("load", [peft.PeftConfig.from_pretrained, tuner.MoeLoraConfig.from_pretrained])
def test_round_trip_through_a_file(tmp_path, load):
    c = config(top_k=2, rank_pattern={"q_proj": 3}, lora_alpha=[1.0, 2.0, 3.0], scoring_func="sigmoid")
    c.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is tuner.MoeLoraConfig and again == c


def test_copies_and_pickles():
    c = config(top_k=2)
    for again in (copy.deepcopy(c), pickle.loads(pickle.dumps(c)), dataclasses.replace(c)):
        assert again == c and again is not c
        again.target_modules.add("other")
        assert "other" not in c.target_modules


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0}, "num_experts: found 0, expected an integer >= 1"),
        ({"top_k": 5}, "top_k: found 5, expected at most num_experts = 4"),
        ({"scoring_func": "argmax"}, "scoring_func: found 'argmax', expected one of softmax, abs_softmax, sigmoid"),
        ({"gate_noise": 0.1}, "gate_noise: unknown field with value 0.1"),
        ({"format_version": 3}, "format_version: found 3, this release reads up to 2"),
        ({"format_version": 3, "gate_noise": 1}, "upgrade"),
        ({"peft_type": "LORA"}, "peft_type: found 'LORA', expected 'MOE_LORA'"),
    ],
)
def test_refusals(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        tuner.MoeLoraConfig(**fields)
    if "peft_type" not in fields:
        stored = moe_lora_interop.MoeLoraConfig().to_dict() | fields
        (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
        for load in (peft.PeftConfig.from_pretrained, tuner.MoeLoraConfig.from_pretrained):
            with pytest.raises(ConfigError, match=message):
                load(tmp_path)


def test_unknown_fields_that_are_null_pass(tmp_path):
    stored = moe_lora_interop.MoeLoraConfig().to_dict() | {"added_by_a_newer_peft": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    assert peft.PeftConfig.from_pretrained(tmp_path).neutral == tuner.MoeLoraConfig().neutral


def test_a_file_must_state_its_format_version(tmp_path):
    stored = moe_lora_interop.MoeLoraConfig().to_dict()
    del stored["format_version"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="format_version: missing, expected 1"):
        tuner.MoeLoraConfig.from_pretrained(tmp_path)


def test_a_value_that_became_wrong_later_is_caught_when_it_is_used():
    c = config()
    c.top_k = 99
    with pytest.raises(ConfigError, match="top_k: found 99"):
        c.to_dict()
