"""Which layers are targeted: PEFT's own function is the truth."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

from moe_lora_interop import ConfigError, MoeLoraConfig
from moe_lora_interop.config.targets import Targets

FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
MODULES = [
    "q_proj",
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.down_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.1.xq_proj",
    "model.layers.2.self_attn.base.q_proj",
    "transformer.h.1.attn.c_attn",
    "h.1.attn.c_attn",
    "layers.1.q_proj",
    "encoder.blocks.0.layers.1.q_proj",
    "model.score.q_proj",
]
CONFIGS = [
    dict(target_modules=["q_proj"]),
    dict(target_modules=["q_proj", "down_proj"]),
    dict(target_modules=["proj"]),
    dict(target_modules=["self_attn.q_proj"]),
    dict(target_modules=["model.layers.0.self_attn.q_proj"]),
    dict(target_modules=["layers.1.q_proj"]),
    dict(target_modules=[]),
    dict(target_modules=".*q_proj"),
    dict(target_modules="q_proj"),
    dict(target_modules=r"model\.layers\.\d+\.(self_attn|mlp)\..*"),
    dict(target_modules=r"model\.layers\.1\..*|lm_head"),
    dict(target_modules=["q_proj"], exclude_modules=["layers.1.q_proj", "self_attn.q_proj"]),
    dict(target_modules=["q_proj"], exclude_modules=r".*\.1\..*"),
    dict(target_modules=["q_proj"], exclude_modules=["q_proj"]),
    dict(target_modules=".*", exclude_modules=["lm_head"]),
    dict(target_modules=["q_proj", "down_proj"], layers_to_transform=1),
    dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 10]),
    dict(target_modules=["down_proj"], layers_to_transform=[0]),
    dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
    dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="blocks"),
    dict(target_modules=["q_proj", "c_attn"], layers_to_transform=[1], layers_pattern=["h", "layers"]),
    dict(target_modules=["q_proj", "c_attn"], layers_to_transform=[1], layers_pattern=["layers", "h"]),
    dict(target_modules=["q_proj"], layers_to_transform=[0, 1], layers_pattern=["layers", "blocks"]),
    dict(target_modules=["model.layers.0.self_attn.q_proj", "q_proj"], layers_to_transform=[1]),
    dict(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]),
    dict(target_modules=["q_proj"], modules_to_save=["score", "h"]),
    dict(target_modules=".*", modules_to_save=["layers"]),
]


def peft_matches(fields, module):
    config = SimpleNamespace(**dict.fromkeys(FIELDS), target_parameters=None)
    config.__dict__.update(fields)
    return bool(check_target_module_exists(config, module))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_matching_equals_pefts(fields, module):
    expected = peft_matches(fields, module)
    assert Targets(**fields).matches(module) == expected
    assert MoeLoraConfig(**fields).targets.matches(module) == expected


_parts = st.sampled_from(["model", "layers", "h", "q_proj", "xq_proj", "mlp", "0", "1", "11"])
_paths = st.lists(_parts, min_size=1, max_size=6).map(".".join)
_some_paths = st.lists(_paths, min_size=1, max_size=3)
_layers = st.none() | st.integers(0, 2) | st.lists(st.integers(0, 11), min_size=1, max_size=3)


@settings(max_examples=400, deadline=None)
@given(
    targets=_some_paths,
    excluded=st.none() | _some_paths | st.sampled_from([r".*\.0\..*", "model.*"]),
    layers=_layers,
    pattern=st.none() | st.sampled_from(["layers", "h", ["h", "layers"], ["model.layers", "h"]]),
    saved=st.none() | _some_paths,
    module=_paths,
)
def test_matching_equals_pefts_on_random_paths(targets, excluded, layers, pattern, saved, module):
    fields = dict(zip(FIELDS, (targets, excluded, layers, pattern, saved), strict=True))
    assert Targets(**fields).matches(module) == peft_matches(fields, module)


def test_select_sorts_what_matches():
    chosen = Targets(["q_proj", "down_proj"]).select(reversed(MODULES))
    assert chosen == sorted(m for m in MODULES if peft_matches(dict(target_modules=["q_proj", "down_proj"]), m))


@pytest.mark.parametrize("name", ["all-linear", "ALL-LINEAR", "All-Linear"])
def test_all_linear_is_everything_but_the_head(name):
    linears = ["model.layers.0.q_proj", "lm_head", "model.up"]
    assert Targets(name).select(linears) == ["model.layers.0.q_proj", "model.up"]
    assert Targets(name).select(linears, heads=["model.up"]) == ["lm_head", "model.layers.0.q_proj"]


def test_all_linear_respects_exclusions():
    linears = ["a.q", "a.v", "b.q", "lm_head"]
    assert Targets("all-linear", exclude_modules=["v"]).select(linears) == ["a.q", "b.q"]
    assert Targets("all-linear", exclude_modules=r"b\..*").select(linears) == ["a.q", "a.v"]
    assert Targets("all-linear", modules_to_save=["a"]).select(linears) == ["b.q"]


@pytest.mark.parametrize("excluded", [["up"], ["m.0.up", "m.1.up"], r".*\.up", r"m\.\d\.up"])
@pytest.mark.parametrize("targets", [["q", "up"], ["m.0.q", "m.0.up", "m.1.q", "m.1.up"]])
def test_what_was_left_out_need_not_be_there(targets, excluded):
    """The modules of an adapter's file are those that were adapted; PEFT saves "all-linear" as a list of all."""
    assert Targets(targets, exclude_modules=excluded).select(["m.0.q", "m.1.q"]) == ["m.0.q", "m.1.q"]
    with pytest.raises(ConfigError, match="'gate': no linear layer of this name"):
        Targets([*targets, "gate"], exclude_modules=excluded).select(["m.0.q", "m.1.q"])


def test_the_head_can_be_named():
    assert Targets(["lm_head"]).select(["a.q", "lm_head"]) == ["lm_head"]


def test_layers_to_transform_restricts_the_selection():
    linears = [f"model.layers.{i}.mlp.experts.{j}.up" for i in range(3) for j in range(2)]
    assert Targets(["up"], layers_to_transform=[1]).select(linears) == linears[2:4]
    assert Targets(["up"], layers_to_transform=[1], layers_pattern="experts").select(linears) == linears[1::2]


LINEARS = [f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in ("q_proj", "k_proj")] + ["lm_head"]


def test_every_name_that_matches_nothing_is_reported_with_near_misses():
    with pytest.raises(ConfigError) as error:
        Targets(["q_proj", "kproj", "gate", "q_prj"]).select(LINEARS)
    problems = {
        name: problem for problem in error.value.problems for name in ("kproj", "gate", "q_prj") if name in problem[:9]
    }
    assert len(error.value.problems) == len(problems) == 3
    assert "did you mean k_proj" in problems["kproj"]
    assert "did you mean q_proj" in problems["q_prj"]
    assert "did you mean" not in problems["gate"]
    assert "This model has k_proj, lm_head, q_proj" in problems["gate"]


@pytest.mark.parametrize("target", ["q_proj", r"model\.layers\.7\..*", "all_linear"])
def test_a_regular_expression_that_matches_nothing_is_reported(target):
    with pytest.raises(ConfigError) as error:
        Targets(target).select(LINEARS)
    assert len(error.value.problems) == 1
    assert repr(target) in error.value.problems[0] and "q_proj" in error.value.problems[0]


@pytest.mark.parametrize(
    "targets",
    [
        Targets(["q_proj"], exclude_modules=["q_proj"]),
        Targets(["q_proj"], layers_to_transform=[9]),
        Targets("all-linear", exclude_modules=".*"),
        Targets([]),
    ],
    ids=str,
)
def test_a_selection_that_ends_up_empty_is_an_error(targets):
    with pytest.raises(ConfigError, match="match nothing"):
        targets.select(LINEARS)


def test_no_target_modules_lists_what_there_is():
    with pytest.raises(ConfigError, match="target_modules: found null, expected some of k_proj, lm_head, q_proj"):
        Targets(None).select(LINEARS)


def test_a_model_without_linear_layers_says_so():
    with pytest.raises(ConfigError, match="no linear layers"):
        Targets(["q_proj"]).select([])


@pytest.mark.parametrize(
    ("fields", "problems"),
    [
        (dict(exclude_modules=["q"]), ["exclude_modules: found ['q'], which leaves none of the 2 layers"]),
        (dict(exclude_modules=["a.q"]), []),
        (
            dict(exclude_modules=["q"], target_modules=["q", "x"]),
            ["exclude_modules: found ", "'x': no linear"],
        ),
        (dict(layers_to_transform=4), ["layers_to_transform: found 4, which leaves none of the 2 layers"]),
        (dict(target_modules=["up"]), ["'up': a.experts.up holds all experts of a layer"]),
        (dict(target_modules="a.experts.*"), ["'a.experts.*': a.experts.up holds all experts of a layer"]),
    ],
)
def test_what_leaves_no_target_is_named(fields, problems):
    targets = Targets(**{"target_modules": ["q"]} | fields)
    if not problems:
        assert targets.select(["a.q", "b.q"]) == ["b.q"]
        return
    with pytest.raises(ConfigError) as error:
        targets.select(["a.q", "b.q"], fused=["a.experts.up"])
    assert len(error.value.problems) == len(problems)
    for found, start in zip(error.value.problems, problems, strict=True):
        assert found.startswith(start)
