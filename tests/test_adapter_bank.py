"""Several adapters on one base against one adapter at a time, row by row; and how often programs are compiled."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from flax import nnx

import moe_lora_interop
import moe_lora_interop.peft_tuner  # noqa: F401  registers MOE_LORA
import moe_lora_jax as mlj
from moe_lora_interop import CheckpointError
from tests.adapters import assert_same_tensors
from tests.hf import make_model, save_model
from tests.nnx_llama import SPEC, load
from tests.toy import assert_same_leaves, leaves
from tools.samples import random_adapter

generate_module = importlib.import_module("moe_lora_jax.models.decoding")  # not the function of this name
IDS = np.random.default_rng(0).integers(3, 90, (5, 6))
MASK = np.array([[1] * 6, [1] * 6, [1] * 4 + [0] * 2, [1] * 6, [0] + [1] * 5])
ROWS = ["b", "a", "__base__", "c", "b"]
SIZES = dict(num_experts=3, r=2, lora_alpha=1, top_k=2, target_modules="all-linear")
CONFIGS = {  # c differs in everything that a config can
    "a": SIZES,
    "b": SIZES,
    "c": dict(
        num_experts=2,
        r=3,
        lora_alpha=1,
        router_input="expert_activations",
        scoring_func="sigmoid",
        router_bias=True,
        target_modules=["up_proj"],
    ),
}


def make_adapter(base, seed, **fields):
    """A random adapter with routers far from uniform."""
    model = mlj.load_base_model(base)
    config = mlj.MoeLoraConfig(**fields, init_lora_weights=False)
    adapter = mlj.to_adapter(mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(seed)))
    rng = np.random.default_rng(seed)
    routers = {
        slot: 0.5 * rng.normal(size=t.shape).astype(t.dtype) if "router" in slot[1] else t
        for slot, t in adapter.tensors.items()
    }
    return moe_lora_interop.Adapter(adapter.config, routers)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(make_model("llama", rms_norm_eps=1e-6), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base):
    return {name: make_adapter(base, seed, **CONFIGS[name]) for seed, name in enumerate(CONFIGS)}


def bank_of(base, adapters, **options):
    return mlj.AdapterBank(mlj.load_base_model(base, **options), adapters)


def logits(model, rows=slice(None)):
    return np.asarray(model(IDS[rows], attention_mask=MASK[rows]))


@pytest.fixture(scope="module")
def alone(base, adapters):
    """{name: logits of all rows by this adapter alone}."""
    found = {"__base__": logits(mlj.load_base_model(base))}
    for name, adapter in adapters.items():
        found[name] = logits(mlj.load_adapter(mlj.load_base_model(base), adapter))
    return found


def assert_rows(found, alone, rows=ROWS):
    for i, name in enumerate(rows):
        real, expected = MASK[i].astype(bool), alone[name][i]
        np.testing.assert_allclose(found[i][real], expected[real], atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_the_adapters_of_these_tests_differ(alone):
    names = sorted(alone)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert np.abs(alone[one] - alone[other]).max() > 1e-2 * np.abs(alone[one]).max()


@pytest.mark.parametrize("options", [{}, dict(scan_layers=True)], ids=str)
def test_every_row_is_that_of_its_adapter_alone(base, adapters, alone, options):
    bank = bank_of(base, adapters, **options)
    for rows in (ROWS, ["a"] * 5, ["c", "c", "a", "b", "__base__"]):
        bank.select(rows)
        assert_rows(logits(bank.model), alone, rows)


def test_it_is_pefts_mixed_batch(base, adapters, tmp_path):
    for name, adapter in adapters.items():
        moe_lora_interop.write(adapter, tmp_path / name)
    twin = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "a", adapter_name="a"
    )
    for name in ("b", "c"):
        twin.load_adapter(tmp_path / name, adapter_name=name)
    ids, mask = torch.tensor(IDS), torch.tensor(MASK)
    positions = torch.tensor(np.clip(np.cumsum(MASK, -1) - 1, 0, None))
    with torch.no_grad():
        theirs = twin.eval()(ids, attention_mask=mask, position_ids=positions, adapter_names=ROWS).logits.numpy()
    bank = mlj.AdapterBank(mlj.load_base_model(base), {name: tmp_path / name for name in adapters})
    bank.select(ROWS)
    real = MASK.astype(bool)
    np.testing.assert_allclose(logits(bank.model)[real], theirs[real], atol=1e-5 * np.abs(theirs).max())


def test_choosing_and_exchanging_adapters_compiles_nothing_anew(base, adapters, alone):
    bank, traced = bank_of(base, adapters), []

    @jax.jit
    def run(state, ids, mask):
        traced.append(1)
        return nnx.merge(graph, state)(ids, mask)

    graph, state = nnx.split(bank.model)
    bank.select(ROWS)  # from here on the state has a number for every row
    graph, state = nnx.split(bank.model)
    assert_rows(run(state, IDS, MASK), alone)
    new = make_adapter(base, 7, **CONFIGS["b"])
    expected = {**alone, "new": logits(mlj.load_adapter(mlj.load_base_model(base), new))}
    bank.replace("b", new, new_name="new")
    rows = ["new", "a", "c", "__base__", "new"]
    bank.select(rows)
    again, state = nnx.split(bank.model)
    assert again == graph and hash(again) == hash(graph)
    assert_rows(run(state, IDS, MASK), expected, rows)
    assert len(traced) == 1 and run._cache_size() == 1
    assert bank.names == ["a", "new", "c"]


def test_the_choice_can_be_an_argument_of_a_compiled_function(base, adapters, alone):
    bank = bank_of(base, adapters)
    graph, state = nnx.split(bank.model)

    @jax.jit
    def run(state, adapter_ids, ids, mask):
        model = nnx.merge(graph, state, copy=True)
        mlj.select_adapters(model, adapter_ids)
        return model(ids, mask)

    for rows in (ROWS, ROWS[::-1]):
        assert_rows(run(state, bank.ids(rows), IDS, MASK), alone, rows)
    assert run._cache_size() == 1


def test_generation_of_every_row_is_that_of_its_adapter_alone(base, adapters):
    bank, prompts = bank_of(base, {name: adapters[name] for name in "ab"}), IDS[:, :3]
    names = ["a", "b", "b", "a", "__base__"]
    bank.select(names)
    together = np.asarray(mlj.generate(bank.model, prompts, max_new_tokens=4))
    programs = generate_module._generate._cache_size()
    bank.replace("b", make_adapter(base, 7, **CONFIGS["b"]))
    mlj.generate(bank.model, prompts, max_new_tokens=4)
    assert generate_module._generate._cache_size() == programs
    for i, name in enumerate(names):
        model = mlj.load_base_model(base)
        if name != "__base__":
            mlj.load_adapter(model, adapters[name])
        np.testing.assert_array_equal(together[i], mlj.generate(model, prompts[i : i + 1], max_new_tokens=4)[0])


def loss_of(model, rows=slice(None)):
    return optax.softmax_cross_entropy_with_integer_labels(model(IDS[rows])[:, :-1], IDS[rows][:, 1:]).sum()


def test_several_are_trained_in_one_step_as_each_alone(base, adapters):
    bank = bank_of(base, adapters)
    bank.select(ROWS)
    train(bank.model)
    for name, adapter in (("b", adapters["b"]), ("c", adapters["c"])):
        rows = [i for i, row in enumerate(ROWS) if row == name]
        model = mlj.load_adapter(mlj.load_base_model(base), adapter)
        train(model, rows)
        expected, found = mlj.to_adapter(model), bank.adapter(name)
        assert found.config == expected.config and found.tensors.keys() == expected.tensors.keys()
        for slot, tensor in expected.tensors.items():
            before = adapter.tensors[slot]
            step, own = tensor - before, found.tensors[slot] - before
            assert np.abs(step).max() > 0, slot
            np.testing.assert_allclose(own, step, atol=1e-4 * np.abs(step).max(), err_msg=f"{name} {slot}")


def train(model, rows=slice(None)):
    """A step of plain gradient descent, which changes everything by its gradient."""
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=mlj.MoeLoraParam)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_of, argnums=nnx.DiffState(0, mlj.MoeLoraParam))(model, rows))

    step(model, optimizer)


def test_the_gradient_of_a_row_reaches_no_other_adapter(base, adapters):
    bank = bank_of(base, adapters)
    bank.select(["a"] * 5)
    gradients = nnx.jit(nnx.grad(loss_of, argnums=nnx.DiffState(0, mlj.MoeLoraParam)))(bank.model)
    of_a, of_others = 0.0, 0.0
    for _, leaf in nnx.to_flat_state(gradients):
        values = np.abs(leaf[...])
        is_stack_of_a = values.shape[0] == 2
        of_a += values[0].sum() if is_stack_of_a else 0
        of_others += values[1:].sum() if is_stack_of_a else values.sum()
    assert of_a > 0 and of_others == 0


def test_saving_gives_back_every_bit(base, adapters, tmp_path):
    bank = bank_of(base, adapters)
    for name, adapter in adapters.items():
        bank.save_pretrained(name, tmp_path / name)
        assert_same_tensors(dict(moe_lora_interop.read(tmp_path / name).tensors), dict(adapter.tensors))


def test_removing_gives_the_base_back(base, adapters):
    bank = bank_of(base, adapters)
    bank.select(ROWS)
    plain = mlj.load_base_model(base)
    assert_same_leaves(leaves(bank.remove()), leaves(plain))
    np.testing.assert_array_equal(logits(bank.model), logits(plain))


def test_another_programs_model_too(base, adapters):
    ids = IDS[:, :6]
    bank = mlj.AdapterBank(load(base), adapters, spec=SPEC)
    bank.select(ROWS)
    found = np.asarray(bank.model(ids))
    for name, adapter in adapters.items():
        expected = np.asarray(mlj.load_adapter(load(base), adapter, spec=SPEC)(ids))
        for i in (i for i, row in enumerate(ROWS) if row == name):
            np.testing.assert_allclose(found[i], expected[i], atol=1e-5 * np.abs(expected).max())
    with pytest.raises(ValueError, match=r"selected for 5 rows, the input has shape \(4, 6, 32\)"):
        bank.model(ids[:4])


# --- refusals -------------------------------------------------------------------------------------------------------


def test_rows_must_be_selected_for_the_batch_that_is_run(base, adapters):
    bank = bank_of(base, {"a": adapters["a"]})
    with pytest.raises(ValueError, match="found 0 selected, expected one for each of the 5 rows of input_ids: call"):
        logits(bank.model)
    bank.select(["a"])  # divides every batch
    with pytest.raises(ValueError, match="found 1 selected, expected one for each of the 5 rows"):
        logits(bank.model)
    with pytest.raises(ValueError, match=r"names: found \['x'\], expected some of \['a', '__base__'\]"):
        bank.select(["a", "x"])
    with pytest.raises(ValueError, match="integers"):
        mlj.select_adapters(bank.model, jnp.ones(5))
    with pytest.raises(ValueError, match="no AdapterBank"):
        mlj.select_adapters(mlj.load_base_model(base), jnp.zeros(5, int))


def test_one_that_is_not_alike_is_not_put_in_place_of_another(base, adapters):
    bank = bank_of(base, {"a": adapters["a"]})
    before = leaves(bank.model)
    with pytest.raises(CheckpointError) as error:
        bank.replace("a", adapters["c"])
    assert {p.split(":")[0] for p in error.value.problems} >= {"num_experts", "r", "scoring_func", "target_modules"}
    with pytest.raises(ValueError, match="name: found 'x'"):
        bank.replace("x", adapters["b"])
    with pytest.raises(ValueError, match="new_name: found '__base__'"):
        bank.replace("a", adapters["b"], new_name="__base__")
    assert_same_leaves(leaves(bank.model), before)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (dict(scope="ffn", target_modules=["up_proj"]), "scope: found 'ffn', expected 'linear'"),
        (dict(router_input="task", num_tasks=2, router_depth=0), "router_input: found 'task', expected 'hidden'"),
    ],
)
def test_routers_beside_the_layers_cannot_be_one_of_several(base, fields, problem):
    modules = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    config = mlj.MoeLoraConfig(**{**dict(r=2, num_experts=2, target_modules=modules), **fields})
    model = mlj.load_base_model(base)
    with pytest.raises(CheckpointError, match=problem):
        mlj.AdapterBank(model, {"a": random_adapter(config, modules)})
    logits(model)  # it is as it was


def test_a_model_with_a_bank_takes_no_other_adapter(base, adapters):
    bank = bank_of(base, {"a": adapters["a"]})
    for attempt in (
        lambda: mlj.AdapterBank(bank.model, {"a": adapters["a"]}),
        lambda: mlj.load_adapter(bank.model, adapters["a"]),
    ):
        with pytest.raises(CheckpointError, match="already has an adapter"):
            attempt()
    for attempt in (lambda: mlj.to_adapter(bank.model), lambda: mlj.summary(bank.model)):
        with pytest.raises(CheckpointError, match="AdapterBank"):
            attempt()
    with pytest.raises(CheckpointError, match="expected names other than '__base__'"):
        mlj.AdapterBank(mlj.load_base_model(base), {"__base__": adapters["a"]})


def test_randomness_in_training_is_refused(base):
    noisy = make_adapter(base, 0, **CONFIGS["a"], lora_dropout=0.1)
    bank = bank_of(base, {"a": noisy})
    bank.select(["a"] * 5)
    logits(bank.model)
    bank.model.train()
    with pytest.raises(ValueError, match="train without lora_dropout"):
        logits(bank.model)
