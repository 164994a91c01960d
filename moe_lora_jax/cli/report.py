"""`moe-lora report`: an HTML page about an adapter: a verdict, what it answers, its routers, experts and training."""

from pathlib import Path
from typing import Annotated

import tyro

import moe_lora_interop
from moe_lora_interop.cli.convert import Layout, Options, parse_options
from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.disk.atomic import replace_file
from moe_lora_interop.errors import ConfigError


def report(
    directory: Annotated[Path, tyro.conf.Positional],
    *,
    model: Path,
    data: Path,
    output: Path | None = None,
    against: Path | None = None,
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    max_new_tokens: int = 48,
    max_length: int = 512,
    layout: Layout = None,
    options: Options = (),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a page about an adapter: a verdict on its routers, answers before and after, experts by token.

    The page is one file that needs no network and no script; its figures are also written as PNG into a folder of the
    same name. The verdict is printed, too.

    Args:
        directory: The adapter's directory, in any layout.
        model: Hugging Face model directory that the adapter is for.
        data: JSONL, as for training; a key "topic" in its lines tells topics apart.
        output: The page; report.html in the adapter's directory if not given.
        against: Another adapter's directory, in any layout, to show beside this one: what differs in config, weights,
            gates, losses and answers.
        prompt: A text to continue without and with the adapter; some prompts of the data if not given. Repeatable.
        max_new_tokens: The most tokens of an answer.
        max_length: Tokens of an example that are used.
        layout: The layout of the adapter; detected if not given.
        options: What the layout does not record; VALUE is JSON or plain text. Repeatable.
    """
    if max_new_tokens < 1:
        raise ConfigError("invalid arguments", [f"max_new_tokens: found {max_new_tokens}, expected at least 1"])
    page = output or directory / "report.html"
    if blocked := [str(path) for path in page.parents if path.is_file()]:
        raise ConfigError("cannot write the page", [f"output: found the file {blocked[0]}, expected a directory"])
    shell = Shell(quiet=quiet, json=json)
    with shell.progress("importing JAX"):
        from moe_lora_jax.adapters.apply import remove_moe_lora
        from moe_lora_jax.adapters.checkpoint import load_adapter
        from moe_lora_jax.adapters.parameter_summary import summary
        from moe_lora_jax.measure.comparison import names_of
        from moe_lora_jax.measure.samples import prompts_of, prompts_of_texts
        from moe_lora_jax.models import load_base_model
        from moe_lora_jax.report.findings import SAMPLES, Asked, find
        from moe_lora_jax.report.page import render
        from moe_lora_jax.report.sections import all_sections
        from moe_lora_jax.train.data import read_data, split_by
        from moe_lora_jax.train.tokenizer import load_tokenizer, pad_id

    with shell.progress("reading the adapter and the model") as bar:
        adapter = moe_lora_interop.read(directory, layout, **parse_options(options))
        other = None if against is None else moe_lora_interop.read(against)
        names = [directory.absolute().name] if against is None else names_of(directory, against)
        tokenizer = load_tokenizer(model)
        base = load_base_model(model)
        vocabulary = base.config.vocab_size
        examples = read_data(data, tokenizer, max_length=max_length, vocab_size=vocabulary, keys=("topic",))
        topics = split_by(examples, "topic")
        prompts = prompts_of_texts(tokenizer, prompt) if prompt else prompts_of(topics, SAMPLES)
        asked = Asked(tokenizer, pad_id(tokenizer, vocabulary), examples, topics, prompts, max_new_tokens)

        bar.stage("running the base model over the data")
        before = find(base, asked, name="base model")
        bar.stage("running the routers over the data")
        load_adapter(base, adapter)
        table = summary(base)
        found = find(base, asked, name=names[0], adapter=adapter, directory=directory, on_progress=bar)
        beside = None
        if other is not None:
            bar.stage("running the other adapter over the data")
            load_adapter(remove_moe_lora(base), other)
            beside = find(base, asked, name=names[1], adapter=other, directory=against, on_progress=bar)

        bar.stage("drawing")
        sections = all_sections(asked, before, found, beside)
        lines = [examples.describe(), f"adapter {directory}", f"base model {model}"]
        html = render(f"Report on {directory.absolute().name}", "; ".join(lines), found.verdict, table, sections)
        pictures = page.with_suffix("")
        pictures.mkdir(parents=True, exist_ok=True)
        replace_file(page, html.encode())
        drawn = {s.name: s for s in sections if s.figure is not None}
        for figure, section in drawn.items():
            replace_file(pictures / f"{figure}.png", section.png)
    shell.say(f"{page}: {len(drawn)} figures, also as PNG in {pictures}")
    shell.say(str(found.verdict))
    losses = {f.name: f.loss for f in (before, found, beside) if f is not None and not isinstance(f.loss, str)}
    verdict = {"word": found.verdict.word, "finding": found.verdict.finding, "change": found.verdict.change}
    figures = {figure: pictures / f"{figure}.png" for figure in drawn}
    shell.give({"page": page, "figures": figures, "verdict": verdict, "losses": losses})
