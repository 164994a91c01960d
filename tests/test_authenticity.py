"""A model whose layers or routers are not what its config says cannot be saved: the file would be another function."""

import re

import jax.numpy as jnp
import pytest
from flax import nnx
from tiny_training import tiny_model

import moe_lora_jax as mlj
from moe_lora_interop import CheckpointError
from moe_lora_jax.layers.feed_forward import MoeLoraFeedForward
from moe_lora_jax.layers.model_router import ModelRouter
from moe_lora_jax.layers.router import Router
from moe_lora_jax.layers.temperature import Temperature

FFN = {"scope": "ffn", "target_modules": ["gate_proj", "down_proj"]}


class Sharper(Router):
    """A routing rule of somebody's own."""

    def __call__(self, x):
        return super().__call__(x * 3)


class SharperModelRouter(ModelRouter):
    def route_hidden(self, hidden):
        super().route_hidden(hidden * 3)


class Louder(mlj.MoeLoraLinear):
    def delta(self, x):
        return 2 * super().delta(x)


class LouderBlock(MoeLoraFeedForward):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Lookalike(nnx.Module):
    """Has the variables of a router and is none."""

    def __init__(self, router):
        self.kernel, self.gating, self.rngs = router.kernel, router.gating, nnx.data(None)

    def __call__(self, x):
        raise NotImplementedError


def become(module, kind):
    """The same variables in an object of another class."""
    made = object.__new__(kind)
    vars(made).update(vars(module))
    return made


def q_proj(model):
    return model.model.layers[0].self_attn.q_proj


def refused(model, tmp_path, *words):
    with pytest.raises(CheckpointError, match="cannot be saved") as error:
        mlj.save_pretrained(model, tmp_path / "out")
    text = str(error.value)
    assert all(word in text for word in words), text
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=re.escape(words[0])):
        mlj.to_adapter(model)


def test_a_swapped_router(tmp_path):
    model = tiny_model()
    q_proj(model).router = become(q_proj(model).router, Sharper)
    refused(model, tmp_path, "model.layers.0.self_attn.q_proj.router: found ", f"{__name__}.Sharper", "expected Router")


def test_a_router_that_is_no_subclass(tmp_path):
    model = tiny_model()
    q_proj(model).router = Lookalike(q_proj(model).router)
    refused(model, tmp_path, "model.layers.0.self_attn.q_proj.router: found ", "Lookalike")


def test_a_swapped_router_of_a_block_and_of_the_model(tmp_path):
    model = tiny_model(**FFN)
    model.model.layers[0].mlp.router = become(model.model.layers[0].mlp.router, Sharper)
    refused(model, tmp_path, "model.layers.0.mlp.router: found ", "Sharper")
    model = tiny_model(scope="model")
    model.moe_lora_router = become(model.moe_lora_router, SharperModelRouter)
    refused(model, tmp_path, "moe_lora_router: found ", "SharperModelRouter", "expected ModelRouter")


def test_a_subclassed_layer_and_block(tmp_path):
    model = tiny_model()
    model.model.layers[0].self_attn.q_proj = become(q_proj(model), Louder)
    refused(model, tmp_path, "model.layers.0.self_attn.q_proj: found ", "Louder", "expected MoeLoraLinear")
    model = tiny_model(**FFN)
    model.model.layers[0].mlp = become(model.model.layers[0].mlp, LouderBlock)
    refused(model, tmp_path, "model.layers.0.mlp: found ", "LouderBlock", "expected MoeLoraFeedForward")


def test_a_method_replaced_in_one_object(tmp_path):
    model = tiny_model()
    q_proj(model).router.decide = lambda logits, tau: None
    refused(model, tmp_path, "model.layers.0.self_attn.q_proj.router: decide replaced")


def test_another_gating_mix_or_scaling_than_the_configs(tmp_path):
    model = tiny_model()
    q_proj(model).scalings = tuple(2 * s for s in q_proj(model).scalings)
    refused(model, tmp_path, "model.layers.0.self_attn.q_proj: scalings: found ")
    model, other = tiny_model(), tiny_model(top_k=3, num_experts=3)
    q_proj(model).router.gating = q_proj(other).router.gating
    refused(model, tmp_path, "model.layers.0.self_attn.q_proj.router: gating: found ")
    model = tiny_model()
    q_proj(model).mix = "weights"
    refused(model, tmp_path, "model.layers.0.self_attn.q_proj: mix: found 'weights', expected 'outputs'")


def test_every_problem_is_listed_once(tmp_path):
    model = tiny_model()
    for name in ("q_proj", "v_proj"):
        layer = getattr(model.model.layers[0].self_attn, name)
        layer.router = become(layer.router, Sharper)
    with pytest.raises(CheckpointError) as error:
        mlj.save_pretrained(model, tmp_path)
    assert [p.partition(":")[0].rpartition("attn.")[2] for p in error.value.problems[:-1]] == [
        "q_proj.router",
        "v_proj.router",
    ]


def test_a_swapped_router_in_a_bank(tmp_path):
    bank = mlj.AdapterBank(mlj.remove_moe_lora(tiny_model()), {"one": mlj.to_adapter(tiny_model())})
    bank.save_pretrained("one", tmp_path / "fine")
    layer = q_proj(bank.model)
    layer.stacks[0].router = become(layer.stacks[0].router, Sharper)
    with pytest.raises(CheckpointError, match=r"model.layers.0.self_attn.q_proj.router: found .*Sharper"):
        bank.save_pretrained("one", tmp_path / "out")


OURS = [{}, FFN, {"scope": "model"}, {"num_experts": 1, "top_k": None}, {"r": [1, 2, 2], "lora_alpha": [1, 2, 4]}]


@pytest.mark.parametrize("fields", OURS)
def test_our_own_models_are_saved_in_train_mode_too(tmp_path, fields):
    model = tiny_model(**fields, lora_dropout=0.1, router_jitter_noise=0.0 if fields.get("num_experts") == 1 else 0.1)
    model.train()
    mlj.save_pretrained(model, tmp_path)
    assert jnp.isfinite(mlj.load_adapter(mlj.remove_moe_lora(model), tmp_path)(jnp.asarray([[1, 2]]))).all()


class SharperTemperature(Temperature):
    def __call__(self, x):
        return super().__call__(x) / 3


def test_a_temperature_that_the_config_does_not_say(tmp_path):
    model = tiny_model(temperature_hidden_size=2)
    path, router = next((p, m.router) for p, m in nnx.iter_modules(model) if type(m) is mlj.MoeLoraLinear)
    place = f"{'.'.join(map(str, path))}.router.temperature"
    router.temperature.least = 0.5
    with pytest.raises(CheckpointError, match=re.escape(f"{place}: least: found 0.5, expected 1.0")):
        mlj.save_pretrained(model, tmp_path)
    router.temperature = SharperTemperature(32, 2, 1.0, rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match=re.escape(place) + ": found .*SharperTemperature"):
        mlj.save_pretrained(model, tmp_path)
