"""Gates over the tokens of a text, and their pictures: against the model's own record, and the HTML as it is parsed."""

import re
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_training import compiled_once, small_dirs, tiny_model  # noqa: F401

import moe_lora_jax as mlj
from moe_lora_interop.errors import ConfigError
from moe_lora_jax.measure.text_gates import (
    TextGates,
    gates_of_ids,
    most_telling,
    pieces,
    text_gates,
    token_information,
)
from moe_lora_jax.report.tokens import EXPERT_COLOURS, STRENGTH, TokenPicture, token_css
from moe_lora_jax.train.tokenizer import load_tokenizer, text_ids

pytestmark = pytest.mark.usefixtures("compiled_once")
TEXT = 'what is <script>alert("two & two")</script>?\nna\u00efve \u65e5\u672c \U0001f600\x07'


@pytest.fixture(scope="module")
def tokenizer(small_dirs):  # noqa: F811
    return load_tokenizer(small_dirs["base"])


def adapted(base, **fields):
    config = {"r": 2, "num_experts": 3, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **fields}
    return mlj.apply_moe_lora(mlj.load_base_model(base), mlj.MoeLoraConfig(**config), rngs=nnx.Rngs(1))


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 2},
        {"threshold": 0.4},
        {"scope": "ffn", "target_modules": ["up_proj", "down_proj"]},
        {"scope": "model", "router_depth": 2, "router_hidden_size": 8, "layerwise": True},
        {"scoring_func": "identity", "norm_topk_prob": False},
    ],
)
def test_shares_are_the_models_own_gates_without_signs_over_their_sum(small_dirs, tokenizer, fields):  # noqa: F811
    model = adapted(small_dirs["base"], **fields)
    _, router = model(jnp.asarray([text_ids(tokenizer, TEXT)]), return_router=True)
    found = text_gates(model, tokenizer, TEXT)
    assert found.shares.keys() == router.keys()
    for module, output in router.items():
        gates = np.abs(np.asarray(output.gates[0], np.float64))
        total = gates.sum(-1, keepdims=True)
        expected = np.divide(gates, total, out=np.zeros_like(gates), where=total > 0)
        np.testing.assert_allclose(found.shares[module], expected, atol=1e-5)


def test_texts_of_different_lengths_keep_their_order():
    model = tiny_model()
    texts = [np.arange(1, n, dtype=np.int32) for n in (40, 3, 17)]

    class Tokenizer:
        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    found = gates_of_ids(model, Tokenizer(), texts)
    for ids, gates in zip(texts, found, strict=True):
        assert "".join(gates.tokens) == " ".join(map(str, ids))
        _, router = model(jnp.asarray([ids]), return_router=True)
        for module, output in router.items():
            np.testing.assert_allclose(gates.shares[module], output.gates[0], atol=1e-5)


def test_tokens_joined_are_the_text(tokenizer):
    ids = text_ids(tokenizer, TEXT)
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids)
    assert "\u65e5" in found and not any("\ufffd" in piece for piece in found)  # three bytes, all of it in the last


def test_the_most_telling_routers_are_those_with_the_most_information():
    one_hot, even = np.eye(4)[[0, 1, 2, 3, 0]], np.full((5, 4), 0.25)
    half = np.eye(4)[[0, 0, 1, 1, 1]]
    shares = {"layers.1.q_proj": one_hot, "layers.0.q_proj": even, "layers.2.q_proj": half}
    bits = token_information([TextGates(("a",) * 5, shares)])
    counts = np.array([0.4, 0.2, 0.2, 0.2])
    assert bits["layers.1.q_proj"] == pytest.approx(-(counts * np.log2(counts)).sum())  # of the mean; each is sure
    assert bits["layers.0.q_proj"] == 0
    assert most_telling(bits, 2) == ["layers.1.q_proj", "layers.2.q_proj"]


def test_what_has_no_gates_is_refused(tokenizer, small_dirs):  # noqa: F811
    model = adapted(small_dirs["base"])
    with pytest.raises(ConfigError, match="text 1: found no tokens"):
        gates_of_ids(model, tokenizer, [np.zeros(0, np.int32)])
    with pytest.raises(ConfigError, match="found no router, expected an adapter with one"):
        text_gates(mlj.load_base_model(small_dirs["base"]), tokenizer, "hi")
    with pytest.raises(ConfigError, match="router_input: found task, expected hidden"):
        text_gates(adapted(small_dirs["base"], router_input="task", num_tasks=2, router_depth=0), tokenizer, "hi")
    with pytest.raises(ConfigError, match="modules: found 'q_proj', expected one of .*self_attn.q_proj"):
        mlj.plot_tokens(model, tokenizer, "hi", modules="q_proj")


# --- the pictures ---------------------------------------------------------------------------------------------------


class Parsed(HTMLParser):
    """tokens: [(class, data-e, title, text)] of each paragraph of text; headings; every tag that was seen."""

    def __init__(self, html: str):
        super().__init__()
        self.paragraphs, self.headings, self.tags, self._in = [], [], set(), None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        found = dict(attrs)
        if tag == "p" and found["class"] == "text":
            self.paragraphs.append([])
        if tag == "span" and "title" in found:
            self.paragraphs[-1].append([found.get("class"), found.get("data-e"), found["title"], ""])
            self._in = "token"
        if tag == "h3":
            self._in = "heading"

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in == "token":
            self.paragraphs[-1][-1][3] += data
        if self._in == "heading":
            self.headings.append(data)


def test_tokens_have_the_expert_of_their_largest_gate(small_dirs, tokenizer, tmp_path):  # noqa: F811
    model = adapted(small_dirs["base"], top_k=2)
    picture = mlj.plot_tokens(model, tokenizer, TEXT, modules=["model.layers.0.self_attn.q_proj"])
    _, router = model(jnp.asarray([text_ids(tokenizer, TEXT)]), return_router=True)
    gates = np.asarray(router["model.layers.0.self_attn.q_proj"].gates[0])
    parsed = Parsed(picture._repr_html_())
    (tokens,) = parsed.paragraphs
    assert parsed.headings == ["model.layers.0.self_attn.q_proj"]
    assert [int(expert) for _, expert, _, _ in tokens] == gates.argmax(-1).tolist()
    for row, (_, _, title, _) in zip(gates, tokens, strict=True):
        listed = [(int(e), int(share)) for e, share in re.findall(r"expert (\d): (\d+)%", title)]
        assert listed == [(e, round(100 * float(row[e]))) for e in np.argsort(-row) if row[e] >= 0.005]
    shown = "".join(text for *_, text in tokens)
    assert '<script>alert("two & two")</script>?\u23ce\nna\u00efve \u65e5\u672c' in shown and "\\x07" in shown
    assert "script" not in parsed.tags and "\x07" not in picture._repr_html_()
    picture.save(tmp_path / "tokens.html")
    saved = Parsed((tmp_path / "tokens.html").read_text("utf-8"))
    assert saved.paragraphs == parsed.paragraphs and "meta" in saved.tags


def test_without_a_choice_the_most_telling_three_are_shown(small_dirs, tokenizer):  # noqa: F811
    targets = ["q_proj", "k_proj", "v_proj", "up_proj"]
    model = adapted(small_dirs["base"], target_modules=targets)
    expected = most_telling(token_information([text_gates(model, tokenizer, "what is two plus two")]), 3)
    assert Parsed(mlj.plot_tokens(model, tokenizer, "what is two plus two")._repr_html_()).headings == expected


def test_a_token_without_experts_has_no_colour_and_many_experts_differ_in_their_line():
    gates = TextGates(("a", "b", "c"), {"m": np.array([[0.0] * 12, np.eye(12)[2], np.eye(12)[10]])})
    none, second, tenth = Parsed(TokenPicture(gates)._repr_html_()).paragraphs[0]
    assert none[:3] == [None, None, "no expert"]
    assert (second[0], tenth[0]) == ("c2 l0", "c2 l1") and (second[1], tenth[1]) == ("2", "10")


def luminance(colour):
    channels = np.asarray(colour) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


@pytest.mark.parametrize(("paper", "ink"), [("ffffff", "1a1a1b"), ("16171a", "e8e8ea")])
@pytest.mark.parametrize("colour", EXPERT_COLOURS)
def test_text_is_readable_on_every_colour_in_light_and_dark(paper, ink, colour):
    """Contrast of at least 4.5, as WCAG 2 asks for, where the colour is strongest."""
    paper, ink, colour = (np.array(list(bytes.fromhex(c.removeprefix("#")))) for c in (paper, ink, colour))
    behind, text = luminance(STRENGTH * colour + (1 - STRENGTH) * paper), luminance(ink)
    assert (max(behind, text) + 0.05) / (min(behind, text) + 0.05) >= 4.5
    assert "/".join(map(str, colour)) in token_css().replace(" ", "/")


def test_the_router_over_a_text_is_drawn_token_by_token(small_dirs, tokenizer):  # noqa: F811
    model, text = adapted(small_dirs["base"], top_k=2), "what is $two$ plus two? " * 6
    gates = text_gates(model, tokenizer, text)
    assert len(gates.tokens) > 64
    module = "model.layers.0.mlp.up_proj"
    figure = mlj.plot_router(model, text, tokenizer=tokenizer, modules=module)
    drawn = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    np.testing.assert_allclose(np.concatenate(drawn, axis=1), gates.shares[module].T)
    labels = [label.get_text() for axes in figure.axes if axes.images for label in axes.get_xticklabels()]
    assert labels == [piece.strip() or "·" for piece in gates.tokens]
    figure.savefig("/dev/null", format="png")
    with pytest.raises(ValueError, match="of a text needs a model and its tokenizer"):
        mlj.plot_router(model, text)
    with pytest.raises(ValueError, match="found tokenizer or modules without a text"):
        mlj.plot_router({"m": [1, 2]}, modules="m")
