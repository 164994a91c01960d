"""`moe-lora VERB ...`: finds the verb among the entry points `moe_lora.verbs`, parses its arguments, calls it.

A verb is a function with typed arguments and a docstring. It is imported only when it is called, so that `moe-lora
inspect` needs neither jax nor torch. Exit codes: 0 done, 1 the verb says no, 2 wrong use or bad input, 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from interop.errors import CheckpointError, ConfigError

GROUP = "moe_lora.verbs"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    verbs = {point.name: point for point in entry_points(group=GROUP)}
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: moe-lora VERB ...\n\nverbs: {', '.join(sorted(verbs))}\n\n`moe-lora VERB --help` explains one.")
        return 0 if args else 2
    if args[0] not in verbs:
        print(f"moe-lora: unknown verb {args[0]!r}, expected one of {', '.join(sorted(verbs))}", file=sys.stderr)
        return 2
    try:
        verb = verbs[args[0]].load()
    except ModuleNotFoundError as error:
        print(f"moe-lora {args[0]} needs the package {error.name!r}: pip install 'moe-lora-jax[all]'", file=sys.stderr)
        return 2
    import tyro

    try:
        code = tyro.cli(verb, prog=f"moe-lora {args[0]}", args=args[1:]) or 0
        sys.stdout.flush()
        return code
    except (CheckpointError, ConfigError) as error:
        print(f"moe-lora {args[0]}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
