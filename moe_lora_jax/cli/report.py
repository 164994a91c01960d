"""`moe-lora report`: an HTML page with pictures of an adapter: its routers on data, its experts, its training."""

from pathlib import Path
from typing import Annotated

import tyro

import moe_lora_interop
from moe_lora_interop.cli.convert import Layout, Options, parse_options
from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.disk.atomic import replace_file


def report(
    directory: Annotated[Path, tyro.conf.Positional],
    *,
    model: Path,
    data: Path,
    output: Path | None = None,
    max_length: int = 512,
    layout: Layout = None,
    options: Options = (),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a page about an adapter: what its experts do, how alike they are, how training went.

    The page is one file that needs no network and no script; its figures are also written as PNG into a folder of the
    same name.

    Args:
        directory: The adapter's directory, in any layout.
        model: Hugging Face model directory that the adapter is for.
        data: JSONL, as for training; a key "topic" in its lines tells topics apart.
        output: The page; report.html in the adapter's directory if not given.
        max_length: Tokens of an example that are used.
        layout: The layout of the adapter; detected if not given.
        options: What the layout does not record; VALUE is JSON or plain text. Repeatable.
    """
    shell = Shell(quiet=quiet, json=json)
    with shell.progress("importing JAX"):
        from moe_lora_interop.checkpoint.run_records import read_metrics
        from moe_lora_jax.adapters.checkpoint import load_adapter
        from moe_lora_jax.adapters.parameter_summary import summary
        from moe_lora_jax.measure.router_statistics import RouterStatistics, router_statistics
        from moe_lora_jax.models import load_base_model
        from moe_lora_jax.report.page import render
        from moe_lora_jax.report.sections import all_sections
        from moe_lora_jax.train.data import read_data, split_by
        from moe_lora_jax.train.tokenizer import load_tokenizer, pad_id

    page = output or directory / "report.html"
    with shell.progress("reading the adapter and the model") as bar:
        adapter = moe_lora_interop.read(directory, layout, **parse_options(options))
        tokenizer = load_tokenizer(model)
        base = load_base_model(model)
        vocabulary = base.config.vocab_size
        examples = read_data(data, tokenizer, max_length=max_length, vocab_size=vocabulary, keys=("topic",))
        load_adapter(base, adapter)

        bar.stage("running the routers over the data")
        statistics: RouterStatistics | str
        if adapter.config.router_input == "task":
            statistics = "This adapter routes by a task id, which the data does not have."
        elif not adapter.routed:
            statistics = "This adapter has no router: one expert per module."
        else:
            topics = split_by(examples, "topic")
            statistics = router_statistics(base, topics, pad_id=pad_id(tokenizer, vocabulary), on_progress=bar)

        bar.stage("drawing")
        sections = all_sections(adapter, statistics, read_metrics(directory) or "There are no records of the training.")
        lines = [examples.describe(), f"adapter {directory}", f"base model {model}"]
        html = render(f"Report on {directory.absolute().name}", "; ".join(lines), summary(base), sections)
        pictures = page.with_suffix("")
        pictures.mkdir(parents=True, exist_ok=True)
        replace_file(page, html.encode())
        drawn = {s.name: s for s in sections if s.figure is not None}
        for name, section in drawn.items():
            replace_file(pictures / f"{name}.png", section.png)
    shell.say(f"{page}: {len(drawn)} figures, also as PNG in {pictures}")
    shell.give({"page": page, "figures": {name: pictures / f"{name}.png" for name in drawn}})
