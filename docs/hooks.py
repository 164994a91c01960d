"""What the pages take from the code when they are built: help texts, tables and other files of the repository."""

import contextlib
import io
import re
from importlib.metadata import entry_points
from pathlib import Path

import tyro

from moe_lora_interop.cli.convert import describe
from moe_lora_interop.dialects.registry import file_dialects
from moe_lora_jax.models.support import support_table

ROOT = Path(__file__).parent.parent


def on_page_markdown(markdown, **_):
    """Replaces a line `{{ name argument }}` by what the function of that name returns."""
    return re.sub(r"^\{\{ (\w+) ?(.*?) \}\}$", lambda found: BLOCKS[found[1]](found[2]), markdown, flags=re.MULTILINE)


def commands(_):
    """Every verb with its own help text."""
    points = sorted(entry_points(group="moe_lora.verbs"), key=lambda point: point.name)
    return "\n\n".join(f"## {point.name}\n\n```text\n{help_text(point)}\n```" for point in points)


def help_text(point):
    """What `moe-lora VERB --help` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        tyro.cli(point.load(), prog=f"moe-lora {point.name}", args=["--help"])
    return out.getvalue().strip()


def layouts(_):
    """The table of layouts."""
    rows = ["| layout | source | options (* required) | expresses |", "|---|---|---|---|"]
    for known in map(describe, file_dialects()):
        options = "<br>".join(f"`{o['name']}`{'*' if o['required'] else ''}: {o['what']}" for o in known["options"])
        cells = (f"`{known['name']}`", known["source"], options, known["notes"])
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def families(_):
    """The table of base models."""
    return support_table()


def file(path):
    """Another file of the repository, without its title and its pictures."""
    text = (ROOT / path).read_text("utf-8").split("\n", 1)[1]
    return re.sub(r"^!\[.*\n", "", text, flags=re.MULTILINE)


BLOCKS = {"commands": commands, "layouts": layouts, "families": families, "file": file}
