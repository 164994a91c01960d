"""The config: every wrong value is named, JSON loses nothing, patterns follow PEFT's rule."""

import copy
import dataclasses
import json
import pickle
from enum import Enum

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from moe_lora_interop import ConfigError, MoeLoraConfig
from moe_lora_interop.export.task_gates import compute_gates

NAN, INF = float("nan"), float("inf")
NOT_BOOL = (None, 0, 1, "true", [])
NOT_INTEGER_FROM_1 = (0, -1, 1.5, True, "2", NAN)
NOT_POSITIVE = (0, -1, NAN, INF, "1", True, None, 10**400)
NOT_FRACTION = (-0.1, 1, 1.5, NAN, "0", None, True)
NOT_COEFFICIENT = (-1e-9, NAN, INF, "0", None, True, 10**400)
NOT_NAMES = ("", [], [""], [1], 3, {"a": 1})
NOT_TEXT = (1, ["a"], True)
NOT_SIZE = (0, -1, 1.5, True, "2")
BAD_REGEX = "q_proj("

# field: (wrong values, a word of what the message says is allowed)
WRONG = {
    "r": ((*NOT_INTEGER_FROM_1, None, [], [4, 0], [4, None], [4, True]), "integer >= 1"),
    "lora_alpha": ((*NOT_POSITIVE, [], [1, 0], [1, NAN]), "finite number > 0"),
    "use_rslora": (NOT_BOOL, "true or false"),
    "num_experts": ((*NOT_INTEGER_FROM_1, None, [4]), "integer >= 1"),
    "shared_lora_A": (NOT_BOOL, "true or false"),
    "target_modules": (("", BAD_REGEX, 3, [1], [""], True, {"a": 1}), "all-linear"),
    "exclude_modules": (("", BAD_REGEX, 3, [1], [""], True), "regular expression"),
    "layers_to_transform": ((-1, 1.0, True, "1", [], [-1], [1.0], [True]), "layer number"),
    "layers_pattern": ((*NOT_NAMES, "layers("), "name"),
    "rank_pattern": ((None, [], {"q": 0}, {"q": 1.5}, {"q": []}, {BAD_REGEX: 4}, {"q": None}, {"(?i)q": 4}), "rank"),
    "alpha_pattern": ((None, [], {"q": 0}, {"q": NAN}, {"q": "1"}, {BAD_REGEX: 4}, {"(?i)q": 4}), "alpha"),
    "num_experts_pattern": ((None, {"q": 0}, {"q": [1]}, {"q": None}, {BAD_REGEX: 4}, {"(?i)q": 4}), "integer >= 1"),
    "top_k_pattern": ((None, {"q": 0}, {"q": 1.5}, {"q": [1]}, {BAD_REGEX: 1}, {"(?i)q": 1}), "integer >= 1 or null"),
    "init_lora_weights": ((*NOT_BOOL, "gaussian"), "true or false"),
    "modules_to_save": ((*NOT_NAMES, ["head("]), "module names"),
    "scope": (("layer", None, 1, ["linear"]), "linear, ffn, model"),
    "router_input": (("x", None, 1), "hidden, task"),
    "router_depth": ((-1, 1.5, True, None, "1"), "integer >= 0"),
    "router_hidden_size": (NOT_SIZE, "integer >= 1"),
    "num_tasks": (NOT_SIZE, "integer >= 1"),
    "task_embedding_dim": (NOT_SIZE, "integer >= 1"),
    "layerwise": (NOT_BOOL, "true or false"),
    "module_order": (NOT_NAMES, "module paths"),
    "scaling_pass_value": ((NAN, INF, "0.1", None, True), "a finite number"),
    "mix": (("inputs", None, 1), "outputs, weights"),
    "n_splits": ((*NOT_INTEGER_FROM_1, None), "integer >= 1"),
    "router_bias": (NOT_BOOL, "true or false"),
    "scoring_func": (("tanh", None, 1, ["softmax"], "Softmax"), "softmax, abs_softmax, sigmoid"),
    "temperature_hidden_size": (NOT_SIZE, "integer >= 1"),
    "router_temperature": (NOT_POSITIVE, "finite number > 0"),
    "top_k": ((0, -1, 1.0, True, "2", [1]), "integer >= 1"),
    "threshold": ((0, -0.1, 1.1, NAN, "0.5", True), "(0, 1]"),
    "adaptive_threshold": (NOT_BOOL, "true or false"),
    "top_p": ((0, -0.1, 1.1, NAN, "0.5", True), "(0, 1]"),
    "entropy_threshold": ((-0.1, 1, NAN, "0.5", True), "[0, 1)"),
    "entropy_index": (NOT_POSITIVE, "finite number > 0"),
    "entropy_eps": (NOT_FRACTION, "[0, 1)"),
    "norm_topk_prob": (NOT_BOOL, "true or false"),
    "routing": (("again", 1, True, [], {}, {"name": "again"}, {"name": "again", "version": 0}), "a registered routing"),
    "routed_scaling_factor": (NOT_POSITIVE, "finite number > 0"),
    "lora_dropout": (NOT_FRACTION, "[0, 1)"),
    "expert_dropout": (NOT_FRACTION, "[0, 1)"),
    "router_dropout": (NOT_FRACTION, "[0, 1)"),
    "router_jitter_noise": (NOT_FRACTION, "[0, 1)"),
    "router_aux_loss": (("none", None, 1, ["mixtral"]), "mixtral"),
    "router_aux_loss_delta": (NOT_FRACTION, "[0, 1)"),
    "router_aux_loss_coef": (NOT_COEFFICIENT, "finite number >= 0"),
    "router_z_loss_coef": (NOT_COEFFICIENT, "finite number >= 0"),
    "format_version": ((0, 3, -1, "1", None, True, [1]), "1 or 2"),
    "peft_type": (("LORA", None, 1), "MOE_LORA"),
    "base_model_name_or_path": (NOT_TEXT, "string"),
    "revision": (NOT_TEXT, "string"),
    "task_type": (NOT_TEXT, "string"),
    "inference_mode": (NOT_BOOL, "true or false"),
    "auto_mapping": (("a", [], 1, {"a": object()}, {"a": NAN}), "object"),
    "peft_version": (NOT_TEXT, "string"),
}
CASES = [(field, value) for field, (values, _) in WRONG.items() for value in values]


def label(case):
    return repr(case) if len(repr(case)) < 40 else "long"


def test_every_field_has_wrong_values_here():
    assert WRONG.keys() == {f.name for f in dataclasses.fields(MoeLoraConfig)}


@pytest.mark.parametrize(("field", "value"), CASES, ids=label)
def test_a_wrong_value_is_named_with_what_is_allowed(field, value):
    with pytest.raises(ConfigError) as error:
        MoeLoraConfig(**{field: value})
    mine = [p for p in error.value.problems if p.startswith(f"{field}: found ")]
    assert len(mine) == 1
    assert WRONG[field][1] in mine[0].split("expected")[1]


def test_the_found_value_is_quoted():
    with pytest.raises(ConfigError, match=r"top_k: found 'two', expected null"):
        MoeLoraConfig(top_k="two")


def test_all_wrong_fields_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        MoeLoraConfig(r=0, lora_dropout=2, scoring_func="tanh", rank_pattern={"(": 1}, task_type=3)
    fields = {p.split(":")[0] for p in error.value.problems}
    assert fields == {"r", "lora_dropout", "scoring_func", "rank_pattern", "task_type"}
    assert all(problem in str(error.value) for problem in error.value.problems)


def test_combinations_are_reported_beside_unrelated_wrong_fields():
    with pytest.raises(ConfigError) as error:
        MoeLoraConfig(top_k=9, num_experts=4, adaptive_threshold=True, lora_dropout=-1)
    assert {p.split(":")[0] for p in error.value.problems} == {"top_k", "adaptive_threshold", "lora_dropout"}


CLASHES = [
    (dict(top_k=5, num_experts=4), "top_k", "num_experts = 4"),
    (dict(r=[2, 2], num_experts=3), "r", "num_experts = 3"),
    (dict(lora_alpha=[2.0] * 4, num_experts=3), "lora_alpha", "num_experts = 3"),
    (dict(threshold=0.2, top_k=1), "threshold", "top_k"),
    (dict(threshold=0.2, top_k_pattern={"q": 1}), "threshold", "top_k"),
    (dict(adaptive_threshold=True), "adaptive_threshold", "threshold"),
    (dict(norm_topk_prob=False), "norm_topk_prob", "dense softmax"),
    (dict(scaling_pass_value=0.1), "scaling_pass_value", "no first pass"),
    (
        dict(scaling_pass_value=0.1, scope="model", router_input="task", num_tasks=2, task_embedding_dim=4),
        "scaling_pass_value",
        "no first pass",
    ),
    (dict(scaling_pass_value=0.1, scope="model", top_k=2), "scaling_pass_value", "of equal gates"),
    (dict(scaling_pass_value=0.1, scope="model", num_experts_pattern={"q": 1}), "scaling_pass_value", "no gate"),
    (dict(norm_topk_prob=False, scoring_func="abs_softmax"), "norm_topk_prob", "dense softmax"),
    (dict(norm_topk_prob=False, top_k_pattern={"q": None}), "norm_topk_prob", "dense softmax"),
    (dict(router_input="expert_activations", scope="ffn"), "router_input", "scope linear"),
    (dict(router_input="expert_activations", scope="model"), "router_input", "scope linear"),
    (dict(router_input="expert_activations", mix="weights"), "router_input", "mix outputs"),
    (dict(router_input="expert_activations", r=[1, 2], num_experts=2), "router_input", "one rank"),
    (dict(router_input="expert_activations", num_tasks=2), "num_tasks", "task"),
    (dict(router_input="expert_activations", threshold=0.2, adaptive_threshold=True), "adaptive_threshold", "hidden"),
    (dict(norm_topk_prob=False, scoring_func="sparsemax"), "norm_topk_prob", "dense softmax or sparsemax"),
    (dict(top_p=0.5, top_k=1, scoring_func="sparsemax"), "top_p", "softmax"),
    (dict(temperature_hidden_size=4, scope="model"), "temperature_hidden_size", "scope linear or ffn"),
    (dict(temperature_hidden_size=4, router_input="expert_activations"), "temperature_hidden_size", "hidden"),
    (dict(temperature_hidden_size=4, router_input="task", num_tasks=2), "temperature_hidden_size", "hidden"),
    (dict(top_p=0.5), "top_p", "without top_k"),
    (dict(top_p=0.5, top_k=1, top_k_pattern={"q": None}), "top_p", "every module"),
    (dict(top_p=0.5, top_k=1, scoring_func="sigmoid"), "top_p", "softmax"),
    (dict(entropy_threshold=0.5), "entropy_threshold", "without top_k"),
    (dict(entropy_threshold=0.5, top_k=1, scoring_func="identity"), "entropy_threshold", "softmax"),
    (dict(top_p=0.5, threshold=0.2), "top_p", "without top_k"),
    (dict(scoring_func="identity"), "norm_topk_prob", "signed scores"),
    (dict(scoring_func="identity", norm_topk_prob=False, threshold=0.3), "threshold", "identity"),
    (dict(scoring_func="identity", norm_topk_prob=False, router_aux_loss_coef=0.1), "router_aux_loss_coef", "identity"),
    (dict(target_modules="all-linear", layers_to_transform=1), "layers_to_transform", "string"),
    (dict(target_modules=".*q", layers_to_transform=[1], layers_pattern="layers"), "layers_pattern", "string"),
    (dict(target_modules=["q"], layers_pattern="layers"), "layers_pattern", "layers_to_transform"),
    (dict(shared_lora_A=True, r=[2, 4], num_experts=2), "shared_lora_A", "unequal ranks"),
    (dict(layerwise=True), "layerwise", "model"),
    (dict(layerwise=True, scope="ffn"), "layerwise", "model"),
    (dict(module_order=["a"]), "module_order", "layerwise"),
    (dict(router_depth=2, router_hidden_size=8), "router_depth", "scope"),
    (dict(scope="model", router_depth=2), "router_hidden_size", "size"),
    (dict(router_hidden_size=8), "router_hidden_size", "router_depth 1"),
    (dict(num_tasks=3), "num_tasks", "router_input"),
    (dict(router_input="task", router_depth=0), "num_tasks", "number"),
    (dict(task_embedding_dim=4), "task_embedding_dim", "router_input"),
    (dict(router_depth=0), "router_depth", "table"),
    (dict(router_input="task", num_tasks=2, router_depth=0, scope="ffn"), "router_input", "ffn"),
    (dict(router_aux_loss="localized", router_aux_loss_coef=0.1, num_experts=3), "router_aux_loss", "even"),
    (dict(router_aux_loss="mixtral", num_experts_pattern={"q": 2}), "router_aux_loss", "one number"),
    (dict(router_aux_loss="mixtral", router_aux_loss_delta=0.1), "router_aux_loss_delta", "expected 0"),
    (dict(n_splits=2), "n_splits", "mix"),
    (dict(mix="weights", scope="ffn"), "mix", "scope"),
    (dict(mix="weights", r=[2, 4], num_experts=2), "mix", "one rank"),
    (dict(mix="weights", shared_lora_A=True), "mix", "an A per expert"),
]


@pytest.mark.parametrize(("fields", "blamed", "hint"), CLASHES, ids=label)
def test_fields_that_do_not_go_together_are_refused(fields, blamed, hint):
    with pytest.raises(ConfigError) as error:
        MoeLoraConfig(**fields)
    mine = [p for p in error.value.problems if p.startswith(f"{blamed}: ")]
    assert any(hint in problem and "expected" in problem for problem in mine)


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(num_experts=1),
        dict(top_k=4, num_experts=4),
        dict(norm_topk_prob=False, top_k=2),
        dict(norm_topk_prob=False, scoring_func="sigmoid"),
        dict(router_input="expert_activations", shared_lora_A=True, top_k=2, router_jitter_noise=0.1),
        dict(top_k=1, top_p=1.0),
        dict(top_k=1, entropy_threshold=0, entropy_index=0.5, scoring_func="abs_softmax", norm_topk_prob=False),
        dict(norm_topk_prob=False, scoring_func="identity"),
        dict(norm_topk_prob=False, scoring_func="identity", top_k=2, router_z_loss_coef=0.1),
        dict(norm_topk_prob=False, threshold=0.3),
        dict(norm_topk_prob=False, scoring_func="sparsemax", top_k=2, router_aux_loss_coef=0.1),
        dict(scoring_func="sparsemax", threshold=0.3, adaptive_threshold=True, temperature_hidden_size=4, scope="ffn"),
        dict(threshold=1, adaptive_threshold=True),
        dict(threshold=0.3, top_k_pattern={"q": None}),
        dict(r=[1, 2, 3, 4], lora_alpha=[1, 2.5, 3, 4]),
        dict(target_modules=[]),
        dict(target_modules=["q"], layers_to_transform=0, layers_pattern=["h", "layers"]),
        dict(scope="model", router_depth=3, router_hidden_size=8, router_dropout=0.1, layerwise=True),
        dict(router_input="task", num_tasks=3, router_depth=0, mix="weights", n_splits=2, scoring_func="sigmoid"),
        dict(lora_dropout=0, router_aux_loss_coef=0, routed_scaling_factor=1e-8),
    ],
    ids=label,
)
def test_right_values_are_accepted(fields):
    config = MoeLoraConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_defaults_are_the_documented_ones():
    config = MoeLoraConfig()
    found = (config.top_k, config.norm_topk_prob, config.lora_dropout, config.init_lora_weights, config.format_version)
    assert found == (None, True, 0.0, True, 1)
    assert (config.scope, config.router_input, config.mix, config.scoring_func) == (
        "linear",
        "hidden",
        "outputs",
        "softmax",
    )


@pytest.mark.parametrize(
    ("fields", "version"),
    [
        ({}, 1),
        ({"scoring_func": "sigmoid", "top_k": 1}, 1),
        ({"top_p": 0.5, "top_k": 1}, 2),
        ({"scoring_func": "identity", "norm_topk_prob": False}, 2),
    ],
)
def test_the_version_is_the_oldest_that_can_say_the_config(fields, version):
    config = MoeLoraConfig(**fields)
    later = {"top_p", "entropy_threshold", "entropy_index", "entropy_eps", "scaling_pass_value"}
    assert config.format_version == config.to_dict()["format_version"] == version
    assert later & config.to_dict().keys() == later & fields.keys()
    assert MoeLoraConfig.from_dict(config.to_dict()) == config
    back = dataclasses.replace(config, top_p=None, scoring_func="softmax", norm_topk_prob=True)
    assert back.format_version == 1


def test_a_file_of_version_1_has_nothing_of_version_2():
    data = {**MoeLoraConfig(top_k=1, top_p=0.5, entropy_threshold=0.9).to_dict(), "format_version": 1}
    with pytest.raises(ConfigError) as error:
        MoeLoraConfig.from_dict(data)
    assert list(error.value.problems) == [
        "top_p: found 0.5, expected what format_version 1 can say",
        "entropy_threshold: found 0.9, expected what format_version 1 can say",
    ]
    data = MoeLoraConfig(scoring_func="identity", norm_topk_prob=False).to_dict() | {"format_version": 1}
    with pytest.raises(ConfigError, match="scoring_func: found 'identity', expected what format_version 1 can"):
        MoeLoraConfig.from_dict(data)


@pytest.mark.parametrize("version", [0, -1, "1", None, True, [1], 1.5], ids=repr)
def test_a_version_that_is_none(version):
    with pytest.raises(ConfigError, match="format_version: (found|missing).*expected 1 or 2"):
        MoeLoraConfig.from_dict({**MoeLoraConfig().to_dict(), "format_version": version})


# --- JSON -----------------------------------------------------------------------------------------------------------

_names = st.lists(st.sampled_from(["q_proj", "mlp.up_proj", "a.0.b", "é", 'quo"te']), min_size=1, unique=True)
_regexes = st.sampled_from(["q_proj", r".*\.0\..*", "(q|v)_proj", ".*", "é", "mlp.up_proj"])
_alphas = st.floats(1e-3, 1e6) | st.integers(1, 10**20)


@st.composite
def configs(draw):
    experts = draw(st.integers(1, 5))
    shared = draw(st.booleans())
    rank = st.integers(1, 64)
    ranks = rank if shared else rank | st.lists(rank, min_size=experts, max_size=experts)
    select = draw(st.sampled_from(["dense", "top_k", "threshold", "adaptive"]))
    pattern = lambda values: st.dictionaries(_regexes, values, max_size=3)  # noqa: E731
    fields = dict(
        r=draw(ranks),
        lora_alpha=draw(_alphas | st.lists(_alphas, min_size=experts, max_size=experts)),
        use_rslora=draw(st.booleans()),
        num_experts=experts,
        shared_lora_A=shared,
        target_modules=draw(st.none() | st.just("all-linear") | _regexes | _names),
        exclude_modules=draw(st.none() | _regexes | _names),
        rank_pattern=draw(pattern(rank)),
        alpha_pattern=draw(pattern(_alphas)),
        num_experts_pattern=draw(pattern(st.integers(1, 9))),
        init_lora_weights=draw(st.booleans()),
        modules_to_save=draw(st.none() | _names),
        router_bias=draw(st.booleans()),
        scoring_func=draw(st.sampled_from(["softmax", "abs_softmax", "sigmoid", "identity", "sparsemax"])),
        router_temperature=draw(_alphas),
        temperature_hidden_size=draw(st.none() | st.integers(1, 2**16)),
        norm_topk_prob=select != "top_k" or draw(st.booleans()),
        routed_scaling_factor=draw(_alphas),
        lora_dropout=draw(st.floats(0, 1, exclude_max=True)),
        router_aux_loss_coef=draw(st.floats(0, 1e9)),
        base_model_name_or_path=draw(st.none() | st.text(max_size=8)),
        task_type=draw(st.sampled_from([None, "CAUSAL_LM"])),
        inference_mode=draw(st.booleans()),
        auto_mapping=draw(st.none() | st.dictionaries(st.text(max_size=3), st.none() | st.integers(), max_size=2)),
    )
    if select == "top_k":
        fields |= dict(top_k=draw(st.integers(1, experts)), top_k_pattern=draw(pattern(st.none() | st.integers(1, 9))))
    if select in ("threshold", "adaptive"):
        fields |= dict(threshold=draw(st.floats(1e-6, 1)), adaptive_threshold=select == "adaptive")
    if isinstance(fields["target_modules"], list) and draw(st.booleans()):
        layers = st.integers(0, 99)
        fields["layers_to_transform"] = draw(layers | st.lists(layers, min_size=1, max_size=3))
        fields["layers_pattern"] = draw(st.none() | st.sampled_from(["layers", "h"]) | st.just(["h", "layers"]))
    if fields["scoring_func"] == "identity":
        fields |= dict(norm_topk_prob=False, threshold=None, adaptive_threshold=False, router_aux_loss_coef=0.0)
    return MoeLoraConfig(**fields)


@settings(max_examples=150, deadline=None)
@given(configs())
def test_json_round_trip_loses_nothing(config):
    back = MoeLoraConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert back == config and hash(back) == hash(config)
    assert json.dumps(back.to_dict()) == json.dumps(config.to_dict())  # to the type of a number and the pattern's order


def sizes_or_none(config, module):
    try:
        return config.for_module(module)
    except ConfigError:
        return None


@settings(max_examples=50, deadline=None)
@given(configs())
def test_copies_are_equal_and_resolving_twice_is_resolving_once(config):
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    resolved = config.resolved(["b", "a"])
    assert resolved.target_modules == ["a", "b"]
    assert resolved.resolved(["a", "b"]) == resolved
    assert all(sizes_or_none(resolved, m) == sizes_or_none(config, m) for m in ("a", "b"))
    kept = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    kept |= {name for name in config.to_dict() if name.endswith("_pattern")}
    assert all(v == resolved.to_dict()[k] for k, v in config.to_dict().items() if k not in kept)


@pytest.mark.parametrize("value", [1, "x", [], {}, False, 0])
def test_unknown_fields_with_a_value_are_refused(value):
    with pytest.raises(ConfigError, match="use_dora: unknown field") as error:
        MoeLoraConfig.from_dict({**MoeLoraConfig().to_dict(), "use_dora": value, "megatron": 1})
    assert len(error.value.problems) == 2


def test_an_unknown_field_that_is_null_is_accepted():
    assert MoeLoraConfig.from_dict({**MoeLoraConfig().to_dict(), "new_in_peft": None}) == MoeLoraConfig()


def test_a_newer_format_version_says_upgrade_and_not_what_it_does_not_know():
    data = {**MoeLoraConfig().to_dict(), "format_version": 3, "new_field": 1, "r": "new meaning"}
    with pytest.raises(ConfigError, match=r"format_version: found 3.*upgrade") as error:
        MoeLoraConfig.from_dict(data)
    assert len(error.value.problems) == 1


def test_a_missing_format_version_is_refused():
    data = MoeLoraConfig().to_dict()
    del data["format_version"]
    with pytest.raises(ConfigError, match="format_version: missing, expected 1"):
        MoeLoraConfig.from_dict(data)


def test_another_peft_type_is_refused():
    with pytest.raises(ConfigError, match="peft_type: found 'LORA', expected 'MOE_LORA'"):
        MoeLoraConfig.from_dict({"peft_type": "LORA", "r": 8})


def test_fields_that_are_absent_get_their_defaults():
    assert MoeLoraConfig.from_dict({"format_version": 1, "r": 3}) == MoeLoraConfig(r=3)


def test_a_hostile_depth_is_a_config_error():
    deep = {}
    for _ in range(3000):
        deep = {"a": deep}
    with pytest.raises(ConfigError, match="auto_mapping"):
        MoeLoraConfig(auto_mapping=deep)


# --- values ---------------------------------------------------------------------------------------------------------


class Task(Enum):
    CAUSAL_LM = "CAUSAL_LM"


def test_tuples_sets_and_enums_become_json_types():
    config = MoeLoraConfig(target_modules={"v", "q"}, layers_to_transform=(1, 2), task_type=Task.CAUSAL_LM)
    assert (config.target_modules, config.layers_to_transform, config.task_type) == (["q", "v"], [1, 2], "CAUSAL_LM")


def test_a_set_of_mixed_types_is_a_config_error():
    with pytest.raises(ConfigError, match="target_modules"):
        MoeLoraConfig(target_modules={"q", 1})


def test_target_lists_compare_as_sets():
    assert MoeLoraConfig(target_modules=["v", "q", "v"]) == MoeLoraConfig(target_modules=["q", "v"])


def test_equal_configs_have_equal_hashes():
    pairs = [(dict(lora_alpha=16), dict(lora_alpha=16.0)), (dict(rank_pattern={}), dict())]
    pairs += [(dict(alpha_pattern={"a": 1, "b": 2}), dict(alpha_pattern={"a": 1.0, "b": 2}))]
    for left, right in pairs:
        left, right = MoeLoraConfig(**left), MoeLoraConfig(**right)
        assert left == right
        assert hash(left) == hash(right)


def test_different_configs_differ():
    assert MoeLoraConfig(r=4) != MoeLoraConfig(r=8)
    assert len({MoeLoraConfig(r=4), MoeLoraConfig(r=4), MoeLoraConfig(r=8)}) == 2


def test_the_config_shares_nothing_with_its_arguments():
    arguments = dict(
        r=[2, 4],
        num_experts=2,
        target_modules=["v", "q"],
        rank_pattern={"q": [3, 5]},
        auto_mapping={"a": {"b": 1}},
    )
    before = copy.deepcopy(arguments)
    config = MoeLoraConfig(**arguments)
    as_dict = config.to_dict()
    as_dict["rank_pattern"]["q"].append(0)
    assert arguments == before
    arguments["rank_pattern"]["q"].append(0)
    arguments["r"].append(0)
    arguments["auto_mapping"]["a"]["b"] = 2
    assert (config.rank_pattern, config.r, config.auto_mapping) == ({"q": [3, 5]}, [2, 4], {"a": {"b": 1}})


def test_from_dict_leaves_the_dict_alone():
    data = {**MoeLoraConfig(target_modules=["v", "q"]).to_dict(), "target_modules": ["v", "q"]}
    before = copy.deepcopy(data)
    MoeLoraConfig.from_dict(data)
    assert data == before


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoeLoraConfig().r = 4


def test_errors_survive_pickling():
    with pytest.raises(ConfigError) as error:
        MoeLoraConfig(r=0, top_k=0)
    back = pickle.loads(pickle.dumps(error.value))
    assert (str(back), back.problems, type(back)) == (str(error.value), error.value.problems, ConfigError)


# --- per module -----------------------------------------------------------------------------------------------------

PATTERNS = [
    ["q_proj", ".*proj"],
    [".*proj", "q_proj"],
    [r"model\.layers\.0\.self_attn\.q_proj"],
    [r"layers\.0\..*"],
    ["self_attn.q_proj"],
    ["_proj", "proj"],
    ["q|v_proj", "down_proj"],
    ["^model.layers.1.mlp.down_proj"],
    [r".*\.(0|1)\.self_attn\..*", "q_proj"],
    ["Q_PROJ"],
    [r"layers\.\d+\.mlp\.down_proj$"],
]
MODULES = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.1.mlp.xdown_proj",
    "layers.0.x",
    "lm_head",
]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("keys", PATTERNS, ids=str)
def test_patterns_follow_pefts_rule(keys, module):
    pattern = {key: 100 + i for i, key in enumerate(keys)}
    expected = pattern.get(get_pattern_key(pattern.keys(), module), 8)
    config = MoeLoraConfig(
        r=8, lora_alpha=8, num_experts=8, top_k=8, rank_pattern=pattern, alpha_pattern=pattern, num_experts_pattern={}
    )
    sizes = config.for_module(module)
    assert (sizes.ranks, sizes.alphas) == ((expected,) * 8, (expected,) * 8)
    sizes = MoeLoraConfig(num_experts=8, num_experts_pattern=pattern, top_k=8, top_k_pattern=pattern).for_module(module)
    assert (sizes.num_experts, sizes.top_k) == (expected, expected)


def test_for_module_gives_sizes_and_scalings():
    config = MoeLoraConfig(r=[2, 4, 8], lora_alpha=[1.0, 2.0, 4.0], num_experts=3, rank_pattern={"v": [1, 1, 16]})
    q, v = config.for_module("a.q"), config.for_module("a.v")
    assert (q.rank, q.scalings, q.has_router) == (8, (0.5, 0.5, 0.5), True)
    assert (v.rank, v.scalings) == (16, (1.0, 2.0, 0.25))
    assert MoeLoraConfig(r=16, lora_alpha=8, use_rslora=True, num_experts=1).for_module("q").scalings == (2.0,)


def test_one_expert_has_no_router_and_no_top_k():
    sizes = MoeLoraConfig(num_experts=4, top_k=2, num_experts_pattern={"v": 1}).for_module("a.v")
    assert (sizes.num_experts, sizes.has_router, sizes.top_k) == (1, False, None)


def test_a_top_k_pattern_of_null_is_dense():
    config = MoeLoraConfig(num_experts=4, top_k=2, top_k_pattern={"v": None})
    assert (config.for_module("q").top_k, config.for_module("v").top_k) == (2, None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(num_experts_pattern={"q": 2}, top_k=3), ["a.q: top_k: found 3", "at most num_experts = 2"]),
        (
            dict(num_experts_pattern={"q": 2}, r=[1, 2, 3, 4]),
            ["a.q: r: found the list [1, 2", "num_experts = 2"],
        ),
        (dict(alpha_pattern={"q": [1, 2]}), ["a.q: lora_alpha: found the list [1, 2]", "num_experts = 4 entries"]),
        (dict(top_k_pattern={"q": 5}), ["a.q: top_k: found 5", "at most num_experts = 4"]),
        (dict(shared_lora_A=True, rank_pattern={"q": [1, 2, 3, 4]}), ["a.q: shared_lora_A", "unequal ranks"]),
    ],
    ids=label,
)
def test_patterns_that_do_not_fit_a_module_name_it(fields, words):
    with pytest.raises(ConfigError) as error:
        MoeLoraConfig(**fields).for_module("a.q")
    assert all(word in str(error.value) for word in words)


def test_every_problem_of_every_module_is_named_and_the_others_are_still_there():
    config = MoeLoraConfig(num_experts=4, top_k=3, num_experts_pattern={"q": 2, "v": 1}, alpha_pattern={"k": [1, 2]})
    with pytest.raises(ConfigError) as error:
        config.for_modules(["a.q", "a.k", "a.v", "a.o"])
    assert [p.partition(": found")[0] for p in error.value.problems] == ["a.q: top_k", "a.k: lora_alpha"]
    fitting, problems = config.fitting(["a.q", "a.k", "a.v", "a.o"])
    assert fitting == config.for_modules(["a.v", "a.o"]) == {m: config.for_module(m) for m in ("a.v", "a.o")}
    assert tuple(problems) == error.value.problems
    assert config.routed(["a.v", "a.o"]) == ["a.o"]


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(top_k=2),
        dict(top_k=2, norm_topk_prob=False),
        dict(top_k=2, top_p=0.9),
        dict(threshold=0.6),
        dict(threshold=0.6, adaptive_threshold=True),
        dict(routed_scaling_factor=2.0),
        dict(scoring_func="sparsemax"),
        dict(scoring_func="sigmoid"),
        dict(scoring_func="sigmoid", norm_topk_prob=False),
        dict(scoring_func="identity", norm_topk_prob=False),
    ],
    ids=label,
)
def test_gates_sum_to_one_where_the_config_says_so(fields):
    config = MoeLoraConfig(num_experts=3, **fields)
    logits = np.array([[0.0, 0.0, 0.0], [5.0, 1.0, -2.0], [-1.0, 0.3, 0.2]])  # of the first, a threshold keeps nothing
    sums = np.stack([compute_gates(z, config, config.top_k) for z in logits]).sum(-1)
    assert config.gates_sum_to_one == bool(np.allclose(sums, 1))
    assert not MoeLoraConfig(num_experts=3, expert_dropout=0.1, **fields).gates_sum_to_one
