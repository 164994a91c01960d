"""The shell verbs that change a checkpoint's layout: `convert`, `layouts` and `combine`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_lora_interop.checkpoint import read_write as checkpoint
from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.dialects.registry import dialect_named, file_dialects
from moe_lora_interop.disk.atomic import require_empty
from moe_lora_interop.errors import ConfigError
from moe_lora_interop.export.combining import combine as combine_adapters
from moe_lora_interop.memory import explained
from moe_lora_interop.rules.configs import options_of, recorded_fields
from moe_lora_interop.rules.dialect import REQUIRED, Dialect

Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Target = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
Options = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="option", metavar="NAME=VALUE")]
Layout = Annotated[str | None, tyro.conf.arg(name="from")]
STEPS = (
    "adapter_model.bin and adapter_model.npz are read as a whole",
    "a .safetensors file is read tensor by tensor: one tensor as it is written, with all its experts, must fit",
)
_FIELDS = {f.name for f in dataclasses.fields(MoeLoraConfig)}


def convert(
    source: Source,
    target: Target,
    *,
    to: str,
    layout: Layout = None,
    options: Options = (),
    allow_loss: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    duplicates: bool = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert an adapter from one layout to another. `moe-lora layouts` lists them.

    Args:
        source: The adapter's directory.
        target: A new or empty directory.
        to: The layout to write; native is ours.
        layout: The layout of the source; detected if not given.
        options: What the source's layout does not record; VALUE is JSON or plain text. Repeatable.
        allow_loss: A config field that may be lost because the target cannot express it. Repeatable.
        duplicates: Also write the tensors that the target's own program stores twice.
    """
    if unknown := [f"allow_loss: {name!r} is no field of the config" for name in allow_loss if name not in _FIELDS]:
        raise ConfigError("invalid arguments", unknown)
    shell = Shell(quiet=quiet, json=json)
    with shell.progress("converting"), explained("converting", STEPS):
        table = dialect_named(to)
        with checkpoint.opened(source, layout, **parse_options(options)) as adapter:
            checkpoint.write(adapter, require_empty(target), to, allow_loss=allow_loss, duplicates=duplicates)
    needed, found = options_of(table, adapter.config, adapter.modules), adapter.dialect.name
    shell.say(f"{source} ({found}) -> {target} ({to}): {len(adapter.tensors)} tensors")
    if needed:
        shell.say(f"{to} does not record everything; to read it back: {_as_flags(needed)}")
    shell.give(
        {"source": source, "from": found, "target": target, "to": to, "tensors": len(adapter.tensors)}
        | {"options": needed}
    )


def _as_flags(options: dict[str, Any]) -> str:
    return " ".join(f"--option {name}='{json.dumps(value)}'" for name, value in options.items())


def parse_options(options: tuple[str, ...]) -> dict[str, Any]:
    """{name: value} from NAME=VALUE; the value is JSON, or else the text itself.

    Raises:
        ConfigError: no "=", or a name given twice.
    """
    parsed: dict[str, Any] = {}
    problems = []
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or not name:
            problems.append(f"option: found {option!r}, expected NAME=VALUE")
        elif name in parsed:
            problems.append(f"option {name}: given twice")
        try:
            parsed[name] = json.loads(text)
        except ValueError:
            parsed[name] = text
    if problems:
        raise ConfigError("invalid arguments", problems)
    return parsed


def layouts(*, json: Json = False, quiet: Quiet = False) -> None:
    """List the layouts: where each comes from, what must be given, what it can and cannot express."""
    shell = Shell(quiet=quiet, json=json)
    known = [describe(d) for d in file_dialects()]
    shell.give(known)
    if json:
        return
    table = Table("layout", "source", "options (* required)", "expresses", show_lines=True)
    for d in known:
        options = "\n".join(f"{o['name']}{'*' if o['required'] else ''}: {o['what']}" for o in d["options"])
        table.add_row(*(escape(text) for text in (d["name"], d["source"], options, d["notes"])))
    Console().print(table)
    shell.say(
        "Every layout is read, and written unless it says read only. Options are given as --option NAME=VALUE; "
        "`--json` lists the fields of each."
    )


def describe(dialect: Dialect) -> dict[str, Any]:
    """JSON-ready: what a layout records, implies, leaves out and needs."""
    return {
        "name": dialect.name,
        "source": dialect.source,
        "file": dialect.weights,
        "options": [
            {"name": o.name, "what": o.what, "required": o.default is REQUIRED}
            | ({} if o.default is REQUIRED else {"default": o.default})
            for o in dialect.options
        ],
        "records": sorted(recorded_fields(dialect)),
        "implies": dict(dialect.fixed),
        "read": True,
        "write": not dialect.read_only,
        "notes": "; ".join(filter(None, (dialect.notes, dialect.read_only and f"read only: {dialect.read_only}")))
        or "everything",
    }


def combine(
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="LORA_DIR LORA_DIR ... DST")],
    *,
    router: Literal["uniform", "random", "arrow"] = "uniform",
    top_k: int | None = None,
    router_temperature: float = 1.0,
    seed: int = 0,
    fill_missing: bool = False,
    allow_different_bases: bool = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make ordinary LoRA adapters the experts of a mixture.

    Args:
        paths: Two or more LoRA directories, and last a new or empty directory for the mixture.
        router: uniform: every expert has weight 1/E; random: small random rows; arrow: each expert's main direction.
        top_k: Experts kept per token; all if not given.
        router_temperature: Divides the router's logits.
        seed: Of the random router.
        fill_missing: Give an adapter that lacks a module a zero expert there.
        allow_different_bases: Accept adapters whose configs name different base models.
    """
    if len(paths) < 3:
        raise ConfigError("invalid arguments", [f"found {len(paths)} paths, expected LORA_DIR LORA_DIR ... DST"])
    *sources, target = paths
    shell = Shell(quiet=quiet, json=json)
    with shell.progress("reading the adapters") as bar:
        adapter = combine_adapters(
            sources,
            router=router,
            top_k=top_k,
            router_temperature=router_temperature,
            seed=seed,
            fill_missing=fill_missing,
            allow_different_bases=allow_different_bases,
            on_progress=bar,
        )
        bar.stage("writing the mixture")
        checkpoint.write(adapter, require_empty(target))
    shell.say(f"{target}: {len(sources)} experts on {len(adapter.modules)} modules, router {router}")
    shell.give({"target": target, "experts": len(sources), "modules": adapter.modules, "router": router})
