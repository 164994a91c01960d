"""What a verb prints, under --quiet and --json: its result and remarks to stdout, its progress to stderr."""

import contextlib
import json
import sys
from typing import Annotated, Any

import tyro
from rich.console import Console

from moe_lora_interop.errors import printable
from moe_lora_interop.progress_bar import Bar, progress

Quiet = Annotated[bool, tyro.conf.arg(help="No progress and no remarks: only what was asked for, errors and warnings.")]
Json = Annotated[bool, tyro.conf.arg(help="Print the result as JSON, and no other text.")]


class Shell:
    """A verb's output under these two flags.

    Args:
        quiet: no progress and no remarks. Errors and warnings never come this way.
        json: the result is one JSON document, alone on stdout.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False):
        self.json = json
        self.remarks = Console(quiet=quiet or json, highlight=False, markup=False, soft_wrap=True)
        self.terminal = Console(stderr=True, quiet=quiet)

    def say(self, line: str) -> None:
        """A remark: beside the result, or the only word where the result is files."""
        if not self.remarks.quiet:
            print(printable(line), flush=True)  # a file is written in blocks, and read while the work goes on

    def log(self, line: str) -> None:
        """Progress where nobody watches: a line on stderr, unless that is a terminal, which shows a bar."""
        if not self.terminal.quiet and not self.terminal.is_terminal:
            print(printable(line), file=sys.stderr, flush=True)

    def give(self, result: Any) -> None:
        """The result, if --json wants it."""
        if self.json:
            print(json.dumps(result, indent=2, default=str))

    def progress(self, text: str) -> contextlib.AbstractContextManager[Bar]:
        """See `progress`."""
        return progress(text, self.terminal)
