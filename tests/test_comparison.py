"""Two adapters side by side: cosines against numpy, gates against the models' own, losses against `evaluate`."""

import dataclasses
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import compiled_once, tiny_base, tiny_model, token_data  # noqa: F401

import moe_lora_jax as mlj
from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.errors import ConfigError
from moe_lora_jax.measure.comparison import GatesApart
from moe_lora_jax.train import TrainSettings, evaluate, train

pytestmark = pytest.mark.usefixtures("compiled_once")
Q, V, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj"
TEXT = "1 2 3 4 5 6 7"


class Digits:
    """Tokens are numbers between blanks."""

    def __call__(self, text, **_):
        ids = [int(word) for word in text.split()]
        return {"input_ids": ids, "special_tokens_mask": [0] * len(ids)}

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def two_models():
    """On one base."""
    return tiny_model(0), mlj.load_adapter(tiny_base(0), mlj.to_adapter(tiny_model(7)))


def test_cosines_are_those_of_numpy():
    a, b = mlj.to_adapter(tiny_model(0)), mlj.to_adapter(tiny_model(7))
    found = mlj.compare(a, b).weights
    assert list(found) == [Q, V, DOWN]
    for module, cosines in found.items():
        assert list(cosines) == ["A", "B", "router"]
        for role, name in (("lora_A", "A"), ("lora_B", "B"), ("router", "router")):
            x, y = (np.asarray(adapter.tensors[module, role], np.float64).flatten() for adapter in (a, b))
            assert cosines[name] == pytest.approx(np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y)), abs=1e-12)


def test_an_adapter_is_like_itself_and_unlike_its_negative():
    a = mlj.to_adapter(tiny_model())
    negative = Adapter(a.config, {slot: -t if slot == (Q, "lora_B") else t for slot, t in a.tensors.items()})
    zero = Adapter(a.config, {slot: 0 * t if slot == (V, "router") else t for slot, t in a.tensors.items()})
    found = mlj.compare(a, negative)
    assert found.config == {} and found.gates == {} and found.losses == {}
    assert found.weights[Q] == pytest.approx({"A": 1, "B": -1, "router": 1})
    assert np.isnan(mlj.compare(a, zero).weights[V]["router"])
    assert "one is zero" in str(mlj.compare(a, zero))


def test_other_sizes_are_not_comparable_and_said():
    a = mlj.to_adapter(tiny_model(r=4))
    b = mlj.to_adapter(tiny_model(r=4, rank_pattern={"q_proj": 8}, num_experts_pattern={"v_proj": 2}))
    found = mlj.compare(a, b).weights
    assert found[Q] == "not comparable: found r 4 and 8"
    assert found[V] == "not comparable: found num_experts 3 and 2"
    assert found[DOWN].keys() == {"A", "B", "router"}
    other = mlj.to_adapter(tiny_model(target_modules=["q_proj", "up_proj"], router_bias=True))
    found = mlj.compare(mlj.to_adapter(tiny_model()), other).weights
    assert (found[V], found["model.layers.0.mlp.up_proj"]) == ("only in the first", "only in the second")
    assert found[Q].startswith("not comparable: found router") and "none and [3]" in found[Q]


def test_differences_of_the_configs_in_words(tmp_path):
    a = mlj.to_adapter(tiny_model())
    other = tiny_model(top_k=None, lora_alpha=8, router_aux_loss_coef=0.01, target_modules=["q_proj"])
    found = mlj.compare(a, mlj.to_adapter(other)).config
    assert list(found) == ["routing", "lora_alpha", "top_k", "router_aux_loss_coef", "target_modules"]
    assert "keep the 2 largest" in found["routing"][0] and "keep all" in found["routing"][1]
    assert found["lora_alpha"] == ("4", "8") and found["top_k"] == ("2", "null")
    assert found["target_modules"] == (
        "q_proj of 1 layer, v_proj of 1 layer, down_proj of 1 layer",
        "q_proj of 1 layer",
    )
    for name, rate in (("one", 1e-2), ("two", 5e-3)):
        train(tiny_model(), token_data(2), tmp_path / name, TrainSettings(steps=1, batch_size=2, learning_rate=rate))
    mlj.save_pretrained(tiny_model(), tmp_path / "three")
    runs = mlj.compare(tmp_path / "one", tmp_path / "two")
    assert runs.names == ("one", "two") and runs.config == {"training: learning_rate": ("0.01", "0.005")}
    alone = mlj.compare(tmp_path / "one", tmp_path / "three").config
    assert alone["training: learning_rate"] == ("0.01", "not recorded")


def test_gates_and_losses_are_the_models_own():
    a, b = two_models()
    data = token_data(3)
    found = mlj.compare(a, b, tokenizer=Digits(), text=TEXT, data=data)
    assert found.losses == {"first": evaluate(a, data), "second": evaluate(b, data)}
    ids = jnp.asarray([[1, 2, 3, 4, 5, 6, 7]])
    routers = [model(ids, return_router=True)[1] for model in (a, b)]
    assert found.gates.keys() == routers[0].keys()
    for module, apart in found.gates.items():
        g, h = (np.asarray(router[module].gates[0], np.float64) for router in routers)
        assert apart.distance == pytest.approx(
            np.mean([np.abs(x - y).sum() / 2 for x, y in zip(g, h, strict=True)]), abs=1e-5
        )
        assert apart.same_first == np.mean(g.argmax(1) == h.argmax(1))


def test_adapters_in_files_are_put_on_the_base_and_taken_off(tmp_path):
    a, b = two_models()
    for name, model in (("a", a), ("b", b)):
        mlj.save_pretrained(model, tmp_path / name)
    base, data = tiny_base(0), token_data(2)
    options = {"tokenizer": Digits(), "text": TEXT, "data": data}
    found = mlj.compare(tmp_path / "a", tmp_path / "b", model=base, **options)
    expected = mlj.compare(a, b, **options)
    losses = {"base model": evaluate(tiny_base(0), data), "a": expected.losses["first"], "b": expected.losses["second"]}
    assert found.losses == pytest.approx(losses, rel=1e-6)
    for module, apart in expected.gates.items():
        assert found.gates[module] == pytest.approx(apart, abs=1e-6)
    assert not hasattr(base, "moe_lora_config") and evaluate(base, data) == evaluate(tiny_base(0), data)


def test_routers_of_different_sizes_have_no_distance():
    found = mlj.compare(
        tiny_model(), tiny_model(num_experts_pattern={"v_proj": 4, "q_proj": 1}), tokenizer=Digits(), text=TEXT
    )
    assert found.gates[V] == "not comparable: found num_experts 3 and 4"
    assert found.gates[Q] == "only in the first" and isinstance(found.gates[DOWN], GatesApart)


class Cells(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.rows, self._open = [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._open = True

    def handle_endtag(self, tag):
        self._open = False

    def handle_data(self, data):
        if self._open:
            self.rows[-1][-1] += data


def test_it_shows_itself_as_tables():
    a, b = two_models()
    found = mlj.compare(a, b, tokenizer=Digits(), text=TEXT, data=token_data(2))
    rows = Cells(found._repr_html_()).rows
    assert [Q, *(f"{found.weights[Q][role]:.3f}" for role in ("A", "B", "router"))] in rows
    assert [Q, f"{found.gates[Q].distance:.3f}", f"{found.gates[Q].same_first:.0%}"] in rows
    assert ["second", f"{found.losses['second']:.4f}"] in rows
    for line in ("config: no difference", "cosine of router", "same first expert", "nats per token", Q):
        assert line in str(found)
    hostile = dataclasses.replace(found, names=("<b>", "x\x1b[31m"), config={"r": ("<i>", "2\x07")})
    assert ["", "<b>", "x\\x1b[31m"] in Cells(hostile._repr_html_()).rows
    assert ["r", "<i>", "2\\x07"] in Cells(hostile._repr_html_()).rows
    assert "\x1b" not in str(hostile) and "x\\x1b[31m" in str(hostile)


def test_what_is_missing_is_asked_for_at_once(tmp_path):
    mlj.save_pretrained(tiny_model(), tmp_path / "a")
    with pytest.raises(ConfigError, match="model: found None, expected the base model.*\n.*tokenizer: found None"):
        mlj.compare(tmp_path / "a", tmp_path / "a", text="1")
    with pytest.raises(ConfigError, match="model: found a model with an adapter"):
        mlj.compare(tmp_path / "a", tmp_path / "a", model=tiny_model(), data=token_data(1))
