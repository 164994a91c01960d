"""`moe-lora VERB ...`: finds the verb among the entry points `moe_lora.verbs`, parses its arguments, calls it.

A verb is a function with typed arguments and a docstring. It is imported only when it is called, so that `moe-lora
inspect` needs neither jax nor torch.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points, version

from moe_lora_interop.cli.flags_file import with_file
from moe_lora_interop.errors import CheckpointError, ConfigError, expected, printable
from moe_lora_interop.memory import NEXT_STEPS, explanation, is_out_of_memory

GROUP = "moe_lora.verbs"
# The first lines of our verbs' docstrings (a test compares): to import the verbs for them would take seconds.
SUMMARIES = {
    "combine": "Make ordinary LoRA adapters the experts of a mixture.",
    "convert": "Convert an adapter from one layout to another. `moe-lora layouts` lists them.",
    "data": "Show what `train` makes of a data file: lengths, and examples with the tokens that count marked.",
    "layouts": "List the layouts: where each comes from, what must be given, what it can and cannot express.",
    "export": "Export a mixture for stock PEFT (lora-experts, lora), or as a standalone Mixtral model.",
    "generate": "Continue a prompt, with or without an adapter.",
    "inspect": "Describe a checkpoint in any layout: tensors, sizes, routing, what vLLM needs. Reads headers only.",
    "measure": "Measure a mixture on data: its mean gates for `export --gates`, or what an export costs.",
    "plan": "Say whether a training run fits on devices that are not here, and what a step costs.",
    "push": "Check an adapter, and upload it to the Hugging Face Hub. Exit code 1: it is not sound, and stays here.",
    "quickstart": "Train a small mixture, show what its experts do, and load it in PyTorch PEFT.",
    "report": "Write a page about an adapter: a verdict on its routers, answers before and after, experts by token.",
    "run": "Run a Python script with the PEFT method MOE_LORA registered, although it never imports it.",
    "train": "Train an adapter and write it where PEFT and moe-lora can read it.",
    "verify": "Check a checkpoint completely. Exit code 0: sound, 1: not.",
}
EXIT_CODES = """exit codes: 0 done
            1 the verb says no: an adapter is not sound, two outputs differ, a run does not fit
            2 wrong use or bad input, with the reasons on stderr
            3 out of memory, with what makes the work smaller on stderr (where Linux kills the process instead: 137)
            130 interrupted; `train` has saved a checkpoint and says how to continue"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    verbs = {point.name: point for point in entry_points(group=GROUP)}
    if args == ["--version"]:
        print(f"moe-lora {version('moe-lora-jax')}")
        return 0
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {name:<11} {SUMMARIES.get(name, '')}".rstrip() for name in sorted(verbs)]
        print("\n".join(["usage: moe-lora VERB ...", "", *lines, "", "`moe-lora VERB --help` explains one."]))
        print(f"\n{EXIT_CODES}")
        return 0 if args else 2
    if args[0] not in verbs:
        print(f"moe-lora: unknown verb {args[0]!r}, {expected(args[0], verbs)}", file=sys.stderr)
        return 2
    point = verbs[args[0]]
    try:
        verb = point.load()
    except ModuleNotFoundError as error:
        return _say_missing(point, error)
    import tyro

    try:
        with contextlib.nullcontext() if args[0] == "run" else _plain_warnings(args[0]):  # a script's are its own
            code = tyro.cli(verb, prog=f"moe-lora {args[0]}", args=with_file(verb, args[1:])) or 0
        sys.stdout.flush()
        return code
    except (CheckpointError, ConfigError) as error:
        print(f"moe-lora {args[0]}: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or args[0] == "run":  # an error of the script is its own
            raise
        print(f"moe-lora {args[0]}: {explanation(error, 'working', NEXT_STEPS)}", file=sys.stderr)
        return 3
    except ModuleNotFoundError as error:
        if not point.extras:  # then it is not a verb of ours that misses it, but a script that `run` runs
            raise
        return _say_missing(point, error)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted: nothing is left half-written; the same command starts again", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _plain_warnings(verb: str) -> Iterator[None]:
    """Warnings are printed as errors are: what they say, without the line of our source that they come from."""

    def plain(message: Warning | str, *_: object, **__: object) -> str:
        return f"moe-lora {verb}: warning: {printable(str(message))}\n"

    before, warnings.formatwarning = warnings.formatwarning, plain
    try:
        yield
    finally:
        warnings.formatwarning = before


def _say_missing(point: EntryPoint, error: ModuleNotFoundError) -> int:
    extra = ",".join(point.extras) or "all"  # declared in pyproject.toml, in brackets behind the verb
    advice = f"pip install 'moe-lora-jax[{extra}]'"
    print(f"moe-lora {point.name} needs the package {error.name!r}: {advice}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
