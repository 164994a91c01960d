"""Pictures of routers and experts: their numbers against plain numpy, and the page as a reader gets it."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from html import escape as html_escape

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny_training import compiled_once, small_dirs, tiny_model, token_data  # noqa: F401

import moe_lora_jax as mlj
from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.cli import main as cli
from moe_lora_jax.adapters.projections import by_projection
from moe_lora_jax.measure.samples import Prompt
from moe_lora_jax.measure.tables import visible
from moe_lora_jax.measure.text_gates import TextGates
from moe_lora_jax.measure.verdict import Verdict
from moe_lora_jax.report import (
    RouterStatistics,
    delta_similarity,
    plot_balance,
    plot_entropy,
    plot_losses,
    plot_similarity,
    router_statistics,
)
from moe_lora_jax.report.findings import Asked, Findings
from moe_lora_jax.report.page import render
from moe_lora_jax.report.sections import all_sections
from moe_lora_jax.train import evaluate, load_tokenizer, read_data
from moe_lora_jax.train.end_of_text import end_ids
from moe_lora_jax.train.tokenizer import prompt_ids, text_ids

pytestmark = pytest.mark.usefixtures("compiled_once")
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
FIGURES = ["usage", "topics", "entropy", "similarity", "loss", "balance"]
RECORDS = [
    {"step": 0, "eval_loss": 6.0},
    *(
        {"step": s, "lm_loss": 6 / s, "router_entropy": 0.5, "router_largest_share": 0.4, "router_dead_experts": s // 2}
        for s in range(1, 6)
    ),
    {"step": 5, "eval_loss": 1.5},
]


def made_up(layers: int, experts: int, projections=PROJECTIONS) -> RouterStatistics:
    rng = np.random.default_rng(0)
    modules = [f"model.layers.{i}.{p}" for i in range(layers) for p in projections]
    by_topic = {m: rng.dirichlet(np.ones(experts), 3) for m in modules}
    shares = {m: rows.mean(0) for m, rows in by_topic.items()}
    return RouterStatistics(("code", "<b>&", "x"), shares, {m: float(rng.uniform()) for m in modules}, by_topic, 100)


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"top_k": None}, {"scope": "ffn", "target_modules": ["up_proj", "down_proj"]},
                                    {"scope": "model", "top_k": None}])  # fmt: skip
def test_statistics_are_means_over_the_tokens_with_loss(fields):
    model = tiny_model(**fields)
    topics = {"a": token_data(3, seed=1), "b": token_data(5, seed=2)}
    gates = {topic: {} for topic in topics}
    for topic, data in topics.items():
        for example in data.examples:
            _, router = model(jnp.asarray(example.ids[None]), return_router=True)
            for module, output in router.items():
                kept = np.asarray(output.gates[0], np.float64)[example.counted]
                gates[topic].setdefault(module, []).append(kept / kept.sum(-1, keepdims=True))
    found = router_statistics(model, topics, batch_size=2)
    assert found.topics == ("a", "b")
    assert found.tokens == sum(int(e.counted.sum()) for data in topics.values() for e in data.examples)
    for module in gates["a"]:
        per_topic = [np.concatenate(gates[topic][module]) for topic in topics]
        together = np.concatenate(per_topic)
        np.testing.assert_allclose(found.by_topic[module], [rows.mean(0) for rows in per_topic], atol=1e-6)
        np.testing.assert_allclose(found.shares[module], together.mean(0), atol=1e-6)
        entropy = -np.where(together > 0, together * np.log(np.where(together > 0, together, 1)), 0).sum(-1).mean()
        assert found.entropy[module] == pytest.approx(entropy / np.log(3), abs=1e-5)


@pytest.mark.parametrize(
    "fields", [{}, {"shared_lora_A": True, "top_k": None}, {"r": [1, 2, 3], "lora_alpha": [2, 4, 6]}]
)
def test_similarity_is_the_cosine_of_the_deltas_written_out(fields):
    adapter = mlj.to_adapter(tiny_model(**fields))
    found = delta_similarity(adapter)
    assert found.keys() == set(adapter.modules)
    for module, matrix in found.items():
        a, b = (adapter.tensors[module, role].astype(np.float64) for role in ("lora_A", "lora_B"))
        deltas = np.stack([b[e] @ a[min(e, len(a) - 1)] for e in range(len(b))]).reshape(len(b), -1)
        norms = np.linalg.norm(deltas, axis=1)
        np.testing.assert_allclose(matrix, deltas @ deltas.T / np.outer(norms, norms), atol=1e-5)


def test_an_untrained_expert_has_no_similarity():
    adapter = mlj.to_adapter(tiny_model())
    tensors = {slot: t.copy() for slot, t in adapter.tensors.items()}
    tensors[adapter.modules[0], "lora_B"][1] = 0
    matrix = delta_similarity(Adapter(adapter.config, tensors))[adapter.modules[0]]
    assert np.isnan(matrix[1]).all() and np.isnan(matrix[:, 1]).all() and np.isfinite(matrix[0, 2])


def test_modules_are_sorted_into_projections_and_layers():
    modules = [f"model.layers.{i}.{p}" for i in (10, 2) for p in reversed(PROJECTIONS)]
    grid = by_projection(modules)
    assert list(grid) == [p.rpartition(".")[2] for p in PROJECTIONS]
    assert grid["v_proj"] == {2: "model.layers.2.self_attn.v_proj", 10: "model.layers.10.self_attn.v_proj"}
    assert by_projection(["model"]) == {"model": {None: "model"}}
    assert by_projection(["a.0.x", "b.0.x"]) == {"a.*.x": {0: "a.0.x"}, "b.*.x": {0: "b.0.x"}}


# --- the figures ----------------------------------------------------------------------------------------------------


def images(figure) -> dict[str, np.ndarray]:
    return {axes.get_title(loc="left"): axes.images[0].get_array() for axes in figure.axes if axes.images}


def test_the_heat_map_shows_the_shares():
    statistics = made_up(28, 64)
    figure = mlj.plot_router(statistics)
    assert figure.get_suptitle() == "Share of gate weight per expert; uniform use would be 1.56 %"
    shown = images(figure)
    assert list(shown) == [p.rpartition(".")[2] for p in PROJECTIONS]
    for projection in PROJECTIONS:
        expected = [statistics.shares[f"model.layers.{i}.{projection}"] for i in range(28)]
        np.testing.assert_allclose(shown[projection.rpartition(".")[2]], expected, rtol=1e-12)


def test_the_heat_map_takes_a_model_or_plain_weights():
    model, data = tiny_model(), token_data(4)
    shares = router_statistics(model, data).shares
    for source in (
        mlj.plot_router(model, data),
        mlj.plot_router(shares),
        mlj.plot_router(router_statistics(model, data)),
    ):
        for name, array in images(source).items():
            (module,) = (m for m in shares if m.endswith(name))
            np.testing.assert_allclose(array[0], shares[module], rtol=1e-6)
    (array,) = images(mlj.plot_router({"model": [[1, 3], [2, 2]]})).values()  # rows are averaged after normalising
    np.testing.assert_allclose(array, [[0.375, 0.625]])
    with pytest.raises(ValueError, match="needs data"):
        mlj.plot_router(model)
    with pytest.raises(ValueError, match="no module has a router"):
        mlj.plot_router({})


def test_modules_may_have_different_numbers_of_experts():
    figure = mlj.plot_router({"layers.0.q_proj": [1, 1], "layers.1.q_proj": [1, 2, 1]})
    assert figure.get_suptitle().endswith("uniform use would be 33.3 %, 50 %")
    (array,) = images(figure).values()
    np.testing.assert_array_equal(np.isnan(np.ma.filled(array, np.nan)), [[False, False, True], [False, False, False]])


def test_lines_show_the_records_and_the_entropies():
    losses, balance = plot_losses(RECORDS), plot_balance(RECORDS)
    assert losses.get_suptitle() == "Loss: training 6 to 1.2, evaluation 6 to 1.5 nats per token"
    training, evaluation = losses.axes[0].lines
    np.testing.assert_array_equal(training.get_xydata(), [(s, 6 / s) for s in range(1, 6)])
    np.testing.assert_array_equal(evaluation.get_xydata(), [(0, 6.0), (5, 1.5)])
    two = plot_losses({"one": RECORDS, "_$2$": RECORDS[:3]})
    assert [line.get_label() for line in two.axes[0].lines] == [
        "training of one, as logged", "evaluation of one", r"training of _\$2\$, as logged", r"evaluation of _\$2\$"
    ]  # fmt: skip
    np.testing.assert_array_equal(two.axes[0].lines[2].get_xydata(), [(1, 6.0), (2, 3.0)])
    assert "largest share of one expert is 40%, 2 experts are dead" in balance.get_suptitle()
    statistics = made_up(3, 4, PROJECTIONS[:1])
    line, most = plot_entropy(statistics, top_k=2).axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), list(enumerate(statistics.entropy.values())))
    assert most.get_ydata()[0] == pytest.approx(np.log(2) / np.log(4))


def test_nothing_to_plot_is_said():
    with pytest.raises(ValueError, match="no record has a router"):
        plot_balance([{"step": 1, "lm_loss": 1.0}])
    with pytest.raises(ValueError, match="the adapter is not trained"):
        plot_similarity(delta_similarity(mlj.to_adapter(tiny_model(init_lora_weights=True))))


# --- the page -------------------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def checked(html: str) -> list[str]:
    """Parses the page strictly, checks what it must not have, and returns the names of its figures."""
    tree = ET.fromstring(html)
    ids = [e.get("id") for e in tree.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert not list(tree.iter("script")) and tree.get("lang") == "en"
    for element in tree.iter():
        for name, value in element.attrib.items():
            if name.rpartition("}")[2] in ("href", "src", "style", "clip-path", "fill"):
                assert not re.search(r"https?:|file:", value), value
            if name.rpartition("}")[2] == "href":
                assert value.startswith(("data:image/png;base64,", "#"))
            if "url(#" in value or value.startswith("#") and name.endswith("href"):
                assert re.search(r"#([\w-]+)", value)[1] in ids, f"{name} = {value}"
    for svg in tree.iter(f"{SVG}svg"):
        assert svg.get("role") == "img" and len(svg.get("aria-label")) > 30
        assert "currentColor" in ET.tostring(svg, "unicode") and "#1a1a1b" not in ET.tostring(svg, "unicode")
    return [figure.get("id") for figure in tree.iter("figure")]


def findings(name: str, **fields) -> Findings:
    """Made up, with texts that HTML and XML would stumble over."""
    adapter = mlj.to_adapter(tiny_model())
    gates = TextGates(("<u>", " & ", "\x00", "\n"), {"model.layers.0.mlp": np.eye(2)[[0, 1, 0, 1]]})
    return Findings(
        name=name, adapter=adapter, loss=1.5, answers=["<u> \x0b"], texts=[gates], records=RECORDS,
        settings={"learning_rate": 0.1, "note": "<u>"}, **fields,
    )  # fmt: skip


class Undecoded:
    def decode(self, ids, **_):
        return f"<u> {ids} & \x08"


def page(*size, against: bool = False) -> str:
    statistics = made_up(*size)
    statistics.by_topic["model.layers.0.mlp"] = np.eye(2)[[0, 1, 1]]  # tells the topics apart best
    found, other = (findings(name, statistics=statistics) for name in ("a <b>", "b & <i>"))
    data = token_data(2)
    asked = Asked(Undecoded(), 0, data, {"all": data}, [Prompt([1], [2])], 4)
    sections = all_sections(asked, replace(found, name="base model"), found, other if against else None)
    summary = mlj.summary(tiny_model())
    return render("a <b> & c", "'\"<i>", Verdict("healthy", "<b>", "<i>"), summary, sections)


@pytest.mark.parametrize(("size", "against"), [((28, 64), False), ((4, 8, ("mlp",)), False), ((1, 2), True)])
def test_the_page_is_well_formed_and_needs_nothing_else(size, against):
    html = page(*size, against=against)
    assert checked(html) == FIGURES
    for tag in ("<b>", "<i>", "<u>"):
        assert tag not in html and html_escape(tag) in html
    assert len(html) < 2_000_000


def test_the_page_is_the_same_every_time():
    assert page(1, 2) == page(1, 2)


@pytest.fixture(scope="module")
def trained(small_dirs, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("report") / "trained"
    line = f"train --model {small_dirs['base']} --data {small_dirs['data']} --output-dir {out} --steps 3 --r 2"
    rest = "--batch-size 4 --num-experts 3 --top-k 2 --learning-rate 1e-2 --log-every 1 --eval-fraction 0.2 --quiet"
    assert cli.main([*line.split(), *rest.split()]) == 0
    return out


def report(dirs, adapter, *more: str) -> int:
    return cli.main(["report", str(adapter), "--model", str(dirs["base"]), "--data", str(dirs["data"]), *more])


def test_the_verb_writes_the_page_and_pngs(small_dirs, trained, tmp_path, capfd):  # noqa: F811
    assert report(small_dirs, trained) == 0
    printed = capfd.readouterr()
    first, verdict = printed.out.splitlines()
    assert first.startswith(f"{trained}/report.html: 6 figures") and printed.err == ""
    word, _, finding = verdict.partition(": ")
    html = (trained / "report.html").read_text()
    assert f"<strong>{word}:</strong> {finding.partition('. To change it')[0]}" in html
    assert checked((trained / "report.html").read_text()) == FIGURES
    assert {p.stem for p in (trained / "report").iterdir()} == set(FIGURES)
    for path in (trained / "report").iterdir():
        with Image.open(path) as image:
            assert image.width == 1500 and len(image.convert("RGB").getcolors(2**24)) > 50
    assert report(small_dirs, trained, "--output", str(tmp_path / "new" / "page.html")) == 0
    assert (tmp_path / "new" / "page.html").read_text() == (trained / "report.html").read_text()


def read(html: str) -> dict[str, list[list[str]]]:
    """{title of a section: the rows of its tables, as text}."""
    tree = ET.fromstring(html)
    return {
        section.find("h2").text: [["".join(cell.itertext()) for cell in row] for row in section.iter("tr")]
        for section in tree.iter("section")
    }


def greedy(model, tokenizer, ids: list[int], count: int) -> str:
    """The likeliest token after the whole text so far, without a cache."""
    made = []
    while len(made) < count and (not made or made[-1] not in end_ids(model, tokenizer)):
        made.append(int(model(jnp.asarray([[*ids, *made]]))[0, -1].argmax()))
    return tokenizer.decode(made, skip_special_tokens=True).strip()


def test_losses_and_answers_are_the_models_own(small_dirs, trained, tmp_path):  # noqa: F811
    out = tmp_path / "page.html"
    prompts = ["what is two plus two", "how do I cook"]
    asked = ["--max-new-tokens", "6", *(word for prompt in prompts for word in ("--prompt", prompt))]
    assert report(small_dirs, trained, "--output", str(out), *asked) == 0
    said = read(out.read_text())
    tokenizer = load_tokenizer(small_dirs["base"])
    base = mlj.load_base_model(small_dirs["base"])
    adapted = mlj.load_adapter(mlj.load_base_model(small_dirs["base"]), trained)
    data = read_data(small_dirs["data"], tokenizer, max_length=512, keys=("topic",))
    models = {"base model": base, "trained": adapted}
    assert said["Loss on the data"][1:] == [[name, f"{evaluate(m, data):.4f}"] for name, m in models.items()]
    expected = []
    for prompt in prompts:
        ids = prompt_ids(tokenizer, prompt)
        expected += [["prompt", prompt], *([name, visible(greedy(m, tokenizer, ids, 6))] for name, m in models.items())]
    assert said["Before and after"] == expected
    rows = dict(said["Hyperparameters"][1:])
    assert (rows["r"], rows["num_experts"], rows["top_k"]) == ("2", "3", "2")
    assert rows["training: learning_rate"] == "0.01" and rows["training: batch_size"] == "4"


def test_without_own_prompts_those_of_the_data_are_asked(small_dirs, trained):  # noqa: F811
    assert report(small_dirs, trained) == 0
    rows = read((trained / "report.html").read_text())["Before and after"]
    tokenizer = load_tokenizer(small_dirs["base"])
    lines = [json.loads(line) for line in small_dirs["data"].read_text().splitlines()]
    firsts = {line["topic"]: line for line in reversed(lines)}.values()
    shown = [(prompt, answer) for (head, prompt), (_, answer) in zip(rows, rows[1:], strict=False) if head == "prompt"]
    again = [tokenizer.decode(text_ids(tokenizer, q["prompt"]), skip_special_tokens=True).strip() for q in firsts]
    assert sorted(prompt for prompt, _ in shown) == sorted(again)
    assert sorted(answer for _, answer in shown) == sorted(q["completion"].strip() for q in firsts)


def test_another_adapter_stands_beside_the_first(small_dirs, trained, tmp_path, capfd):  # noqa: F811
    other = tiny_adapter(small_dirs["base"], r=4, num_experts=3, target_modules=["q_proj", "up_proj"])
    mlj.save_pretrained(other, tmp_path / "other")
    out = tmp_path / "page.html"
    assert report(small_dirs, trained, "--output", str(out), "--against", str(tmp_path / "other"), "--json") == 0
    given = json.loads(capfd.readouterr().out)
    html = out.read_text()
    said = read(html)
    assert checked(html) == FIGURES
    tokenizer = load_tokenizer(small_dirs["base"])
    data = read_data(small_dirs["data"], tokenizer, max_length=512, keys=("topic",))
    assert given["losses"].keys() == {"base model", "trained", "other"}
    assert given["losses"]["other"] == pytest.approx(evaluate(other, data), rel=1e-5)
    assert given["verdict"]["word"] in html and "The verdict on other: " in html
    assert "other: There are no records of the training." in html
    side = said["Side by side"]
    assert ["r", "2", "4"] in side and ["training: learning_rate", "0.01", "not recorded"] in side
    q_proj = "model.layers.0.self_attn.q_proj"
    expected = mlj.compare(trained, tmp_path / "other")
    assert expected.weights[q_proj] == "not comparable: found r 2 and 4"
    assert [q_proj, "not comparable: found r 2 and 4"] in [[c for c in row if c] for row in side]
    gates = [row for row in side if row[0] == q_proj and len(row) > 2 and row[2].endswith("%")]
    assert len(gates) == 1
    headings = [h.text for h in ET.fromstring(html).iter("h3")]
    assert {h.partition(": ")[0] for h in headings} == {"trained", "other"}


def test_wrong_arguments_are_refused(small_dirs, trained, capfd):  # noqa: F811
    assert report(small_dirs, trained, "--max-new-tokens", "0") == 2
    assert "max_new_tokens: found 0, expected at least 1" in capfd.readouterr().err


def test_what_is_missing_is_said_on_the_page(small_dirs, tmp_path):  # noqa: F811
    base = mlj.load_base_model(small_dirs["base"])
    plain = mlj.MoeLoraConfig(r=2, num_experts=1, top_k=None, target_modules=["q_proj"])
    mlj.save_pretrained(mlj.apply_moe_lora(base, plain, rngs=nnx.Rngs(0)), tmp_path / "plain")
    assert report(small_dirs, tmp_path / "plain") == 0
    html = (tmp_path / "plain" / "report.html").read_text()
    assert checked(html) == []
    for reason in ("no router: one expert per module", "no records of the training", "every module has one expert",
                   "<strong>no verdict:</strong> this adapter has no router"):  # fmt: skip
        assert reason in html
    untold = tmp_path / "untold.jsonl"
    untold.write_text(json.dumps({"text": "what is two plus two"}) + "\n")
    model = tiny_adapter(small_dirs["base"], scope="model", top_k=None)
    mlj.save_pretrained(model, tmp_path / "model")
    assert report({**small_dirs, "data": untold}, tmp_path / "model") == 0
    html = (tmp_path / "model" / "report.html").read_text()
    assert checked(html) == ["usage", "entropy", "similarity"] and "fewer than two values" in html
    assert "found only whole texts in the data" in html
    by_task = tiny_adapter(small_dirs["base"], router_input="task", num_tasks=2, router_depth=0)
    mlj.save_pretrained(by_task, tmp_path / "task")
    assert report(small_dirs, tmp_path / "task") == 0
    html = (tmp_path / "task" / "report.html").read_text()
    assert checked(html) == ["similarity"] and "no verdict:</strong> this adapter routes by a task id" in html


def tiny_adapter(base, **fields):
    config = {"r": 2, "num_experts": 3, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **fields}
    return mlj.apply_moe_lora(mlj.load_base_model(base), mlj.MoeLoraConfig(**config), rngs=nnx.Rngs(1))


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.skipif(CHROMIUM is None, reason=f"needs a browser: none of {', '.join(BROWSERS)} is on PATH")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 420])
def test_a_browser_shows_every_section_at_two_widths(tmp_path, scheme, width):
    height = {1100: 6000, 420: 9000}[width]
    file, shot = tmp_path / "page.html", tmp_path / "shot.png"
    file.write_text(page(4, 8, against=True))
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    command = [CHROMIUM, "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}", *dark]
    subprocess.run([*command, f"--screenshot={shot}", file.as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (height, width, 3)
    paper, line = {"light": ((255, 255, 255), (216, 216, 220)), "dark": ((22, 23, 26), (58, 59, 64))}[scheme]
    titles = list(read(file.read_text()))
    rows = (pixels == line).all(-1)
    inner = slice(20, width - 20) if width == 420 else slice(70, 1030)  # the one width that everything has
    rules = [row for row in np.flatnonzero(rows[:, inner].all(1)) if not drawn_near(pixels, row, paper)]
    assert len(rules) == len(titles) and tuple(pixels[-1, -1]) == paper, "a rule above every section; the page ends"
    for top, bottom, title in zip(rules, [*rules[1:], height], titles, strict=True):
        drawn = np.abs(pixels[top + 2 : bottom - 2] - paper).max(-1) > 40
        assert drawn.any(1).sum() > 40 and drawn.mean() > 0.005, f"{title}: nearly empty"
        assert not drawn[:, : inner.start - 1].any() and not drawn[:, inner.stop + 1 :].any(), f"{title}: too wide"
    red = np.abs(pixels[: rules[0]] - (0, 158, 115)).max(-1) < 3
    assert red.any(1).sum() > 30, "the mark of a healthy verdict"
    hues = {tuple(c) for c in ((0, 114, 178), (230, 159, 0))}  # of experts 0 and 1, below their tokens
    start = rules[titles.index("Experts over text")]
    for hue in hues:
        assert (pixels[start : rules[titles.index("Use of the experts")]] == hue).all(-1).any()


def drawn_near(pixels: np.ndarray, row: int, paper: tuple[int, int, int]) -> bool:
    """A line of a table has text within 20 pixels; a rule between sections does not."""
    around = np.concatenate([pixels[max(0, row - 16) : row - 1], pixels[row + 2 : row + 16]])
    return bool((np.abs(around - paper).max(-1) > 40).any())
