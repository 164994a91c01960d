"""Putting a mixture into a model and taking it out again."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_lora_interop import CheckpointError, ConfigError, MoeLoraConfig
from moe_lora_jax import MoeLoraLinear, MoeLoraParam, apply_moe_lora, remove_moe_lora
from tests.toy import KINDS, MODULES, Toy, assert_same_leaves, fast_rngs, leaves, linear, run


def applied(model=None, seed=0, param_dtype=jnp.float32, **fields):
    model = Toy() if model is None else model
    fields = {"r": 2, "num_experts": 3, "init_lora_weights": False, "target_modules": "all-linear", **fields}
    return apply_moe_lora(model, MoeLoraConfig(**fields), rngs=fast_rngs(seed), param_dtype=param_dtype)


def wrapped(model):
    return sorted(".".join(map(str, path)) for path, m in nnx.iter_modules(model) if isinstance(m, MoeLoraLinear))


Q, UP, DOWN = ([f"layers.{i}.{kind}" for i in range(2)] for kind in KINDS)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (dict(target_modules="all-linear"), MODULES),
        (dict(target_modules=["q_proj"]), Q),
        (dict(target_modules=["layers.1.q_proj"]), Q[1:]),
        (dict(target_modules=["lm_head", "mlp.up_proj"]), [*UP, "lm_head"]),
        (dict(target_modules=r"layers\.0\..*"), [DOWN[0], UP[0], Q[0]]),
        (dict(target_modules=r".*_proj", exclude_modules=["up_proj", "layers.0.q_proj"]), [DOWN[0], DOWN[1], Q[1]]),
        (dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers"), [UP[1], Q[1]]),
        (dict(target_modules="all-linear", exclude_modules=r".*mlp.*"), Q),
    ],
    ids=str,
)
def test_the_targeted_layers_are_wrapped_and_no_other(fields, expected):
    model = applied(**fields)
    assert wrapped(model) == expected
    assert model.moe_lora_config.target_modules == expected
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        assert getattr(model.moe_lora_config, name) is None


def test_the_model_itself_is_changed_and_returned():
    model = Toy()
    assert applied(model) is model
    assert isinstance(model.layers[1].mlp.up_proj, MoeLoraLinear)


def test_zero_b_leaves_the_function_unchanged_and_random_b_does_not():
    plain = run(Toy())
    np.testing.assert_array_equal(run(applied(init_lora_weights=True)), plain)
    assert (abs(run(applied()) - plain) > 1e-3).any()


@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_patterns_give_each_layer_its_own_sizes():
    model = applied(
        r=4,
        num_experts=3,
        top_k=2,
        rank_pattern={"q_proj": 5, r"layers\.0\..*": 1},
        num_experts_pattern={"layers.1.mlp.up_proj": 1, "down_proj": 2},
        top_k_pattern={"down_proj": 1},
        alpha_pattern={"down_proj": 7},
    )
    for i, block in enumerate(model.layers):
        assert block.q_proj.lora_a.shape == (3, 5, 6) and block.q_proj.lora_b.shape == (3, 5, 6)
        rank = 1 if i == 0 else 4
        assert block.mlp.down_proj.lora_a.shape == (2, rank, 8)
        assert block.mlp.down_proj.lora_b.shape == (2, rank, 6)
        assert block.mlp.down_proj.scalings == (7 / rank,) * 2
        assert (block.q_proj.router.gating.top_k, block.mlp.down_proj.router.gating.top_k) == (2, 1)
    assert model.layers[0].mlp.up_proj.lora_a.shape == (3, 1, 6)
    alone = model.layers[1].mlp.up_proj
    assert alone.router is None and alone.lora_a.shape == (1, 4, 6)


def test_layers_do_not_share_their_random_numbers():
    values = [v.tobytes() for name, v in leaves(applied(), MoeLoraParam).items() if name.endswith("q_proj.lora_a")]
    assert len(values) == len(set(values)) == 2
    assert_same_leaves(leaves(applied(seed=3), MoeLoraParam), leaves(applied(seed=3), MoeLoraParam))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_experts_are_stored_in_param_dtype_and_routers_in_fp32(dtype):
    for name, value in leaves(applied(param_dtype=dtype), MoeLoraParam).items():
        assert value.dtype == (jnp.float32 if "router" in name else dtype), name


def test_a_bf16_base_stays_bf16():
    model = applied(Toy(dtype=jnp.bfloat16))
    assert run(model).dtype == jnp.bfloat16
    assert {v.dtype.name for v in leaves(model, MoeLoraParam).values()} == {"float32"}


def test_train_and_eval_reach_every_layer():
    model = applied(lora_dropout=0.5)
    expected = run(model)
    model.train()
    assert not any(model.layers[i].q_proj.dropout.deterministic for i in range(2))
    assert (run(model) != expected).any()
    model.eval()
    np.testing.assert_array_equal(run(model), expected)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_targets_that_match_nothing_leave_the_model_alone():
    model = Toy()
    before = leaves(model)
    with pytest.raises(ConfigError) as error:
        applied(model, target_modules=["qproj", "gate", "up_proj"])
    gate, qproj = error.value.problems
    assert gate.startswith("'gate'") and qproj.startswith("'qproj'") and "did you mean q_proj" in qproj
    assert wrapped(model) == [] and not hasattr(model, "moe_lora_config")
    assert_same_leaves(leaves(model), before)


def test_every_module_that_the_patterns_do_not_fit_is_listed():
    model = Toy()
    with pytest.raises(ConfigError) as error:
        applied(model, top_k=3, num_experts_pattern={"q_proj": 2}, rank_pattern={"up_proj": [1, 2]})
    named = {problem.split(":")[0] for problem in error.value.problems}
    assert named == {f"layers.{i}.{kind}" for i in range(2) for kind in ("q_proj", "mlp.up_proj")}
    assert wrapped(model) == []


def test_a_failure_in_a_later_block_leaves_the_model_alone():
    model = Toy(use_bias=False)
    model.layers[1].mlp.down_proj = linear(8, 6, use_bias=True, dtype=jnp.float32, rngs=fast_rngs(0))
    before = leaves(model)
    with pytest.raises(ConfigError, match="layers.1.mlp.down_proj"):
        applied(model, scope="ffn", target_modules=["up_proj", "down_proj"], top_k=1, norm_topk_prob=False)
    assert_same_leaves(leaves(model), before)
    assert wrapped(applied(model)) == MODULES  # it can still be applied to


def test_applying_twice_is_refused():
    model = applied(target_modules=["q_proj"])
    before = leaves(model)
    for target in (["q_proj"], ["up_proj"]):
        with pytest.raises(CheckpointError, match="already has an adapter.*remove_moe_lora"):
            applied(model, target_modules=target)
    assert_same_leaves(leaves(model), before)


def test_modules_to_save_are_refused_because_only_pytorch_has_them():
    with pytest.raises((CheckpointError, ConfigError), match="modules_to_save"):
        applied(target_modules=["q_proj"], modules_to_save=["lm_head"])


def test_a_model_that_is_one_linear_layer_is_refused():
    with pytest.raises(ConfigError):
        applied(linear(3, 4, use_bias=False, dtype=jnp.float32, rngs=fast_rngs(0)))


class Experts(nnx.Module):
    def __init__(self, name):
        self.experts = nnx.Dict({name: linear(3, 3, use_bias=False, dtype=jnp.float32, rngs=fast_rngs(0))})


@pytest.mark.parametrize("name", ["0", "q_proj"])
def test_layers_in_a_dict_are_found_by_their_keys(name):
    assert isinstance(applied(Experts(name)).experts[name], MoeLoraLinear)


def test_a_layer_whose_name_has_a_dot_is_refused():
    with pytest.raises(ConfigError, match="experts.a.b"):
        applied(Experts("a.b"))


# --- removing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, dict(num_experts=1), dict(lora_dropout=0.1), dict(scope="ffn", target_modules=["up_proj", "down_proj"])],
    ids=str,
)
def test_removing_restores_the_base_bit_by_bit(fields):
    model = Toy(use_bias=True)
    before, expected, layers = leaves(model), run(model), dict(nnx.iter_modules(model))
    applied(model, **fields)
    assert (run(model) != expected).any()
    assert remove_moe_lora(model) is model
    assert_same_leaves(leaves(model), before)
    assert {p: type(m) for p, m in nnx.iter_modules(model)} == {p: type(m) for p, m in layers.items()}
    np.testing.assert_array_equal(run(model), expected)
    assert not hasattr(model, "moe_lora_config")
    assert wrapped(applied(model)) == MODULES  # and again


def test_removing_from_a_model_without_adapter_does_nothing():
    model = Toy()
    before = leaves(model)
    assert_same_leaves(leaves(remove_moe_lora(model)), before)


def test_the_config_given_is_not_changed():
    config = MoeLoraConfig(target_modules=["q_proj", "mlp.up_proj"], rank_pattern={"q_proj": 3})
    before = copy.deepcopy(config.to_dict())
    apply_moe_lora(Toy(), config, rngs=fast_rngs(0))
    assert config.to_dict() == before
