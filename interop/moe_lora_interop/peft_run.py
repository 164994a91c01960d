"""`moe-lora run -- python train.py ...`: a training script that never imports us, with MOE_LORA registered first.

PEFT finds a method only after something has imported it. This imports the tuner and then runs the script as Python
would: its own sys.argv, its folder first on sys.path, `__name__ == "__main__"`.

    moe-lora run -- python train.py --lr 1e-4
    moe-lora run -- -m package.module ...
    moe-lora run -- trl sft ...

A launcher starts new Python processes, which would not know the method. There this module goes inside:

    accelerate launch -m moe_lora_interop.peft_run train.py --lr 1e-4
    torchrun --nproc-per-node 2 -m moe_lora_interop.peft_run train.py --lr 1e-4
"""

import re
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from moe_lora_interop.cli.shell import Quiet, Shell
from moe_lora_interop.errors import ConfigError

LAUNCHERS = ("accelerate", "torchrun", "deepspeed")
USAGE = (
    "expected: moe-lora run -- python SCRIPT ARGUMENTS, moe-lora run -- -m MODULE ARGUMENTS, or an installed program"
)


def run(command: tyro.conf.Positional[tuple[str, ...]], *, quiet: Quiet = False) -> int:
    """Run a Python script with the PEFT method MOE_LORA registered, although it never imports it.

    Args:
        command: What follows `--`: python SCRIPT ARGUMENTS, -m MODULE ARGUMENTS, or a program such as trl.
    """
    return execute(command, Shell(quiet=quiet))


def execute(command: Sequence[str], shell: Shell) -> int:
    """Registers the tuner and runs the command in this process; a SystemExit of the script passes through.

    Raises:
        ConfigError: the command is no Python script, module or installed Python program.
    """
    module, target, arguments = _parse(command)
    with shell.progress("importing PyTorch and PEFT"):
        _register()
    if module:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
        sys.argv = [target, *arguments]
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(target).resolve().parent))
        sys.argv = [target, *arguments]
        runpy.run_path(target, run_name="__main__")
    return 0


def _register() -> None:
    try:
        import moe_lora_interop.peft_tuner  # noqa: F401
    except ModuleNotFoundError as error:
        problem = f"the package {error.name!r} is missing: pip install 'moe-lora-jax[torch]'"
        raise ConfigError("the PEFT method cannot be registered", [problem]) from None


def _parse(command: Sequence[str]) -> tuple[bool, str, list[str]]:
    """Whether it is a module, its name or path, and its arguments."""
    words = list(command)
    if words and words[0] == "--":
        words = words[1:]
    said_python = bool(words) and re.fullmatch(r"python[\d.]*", Path(words[0]).name) is not None
    if said_python:
        words = words[1:]
    if not words:
        raise ConfigError("nothing to run", [USAGE])
    if words[0] == "-m":
        if len(words) < 2:
            raise ConfigError("-m without a module", [USAGE])
        if words[1].split(".")[0] in LAUNCHERS or words[1].startswith("torch.distributed"):
            raise ConfigError(_inside(words[1]))
        return True, words[1], words[2:]
    if words[0].startswith("-"):
        raise ConfigError("options of Python itself cannot be passed on", [f"found {words[0]!r}", USAGE])
    if not said_python and Path(words[0]).name in LAUNCHERS:
        raise ConfigError(_inside(Path(words[0]).name))
    if Path(words[0]).is_file():
        return False, words[0], words[1:]
    program = None if said_python else shutil.which(words[0])
    if program is None:
        raise ConfigError("nothing to run", [f"{words[0]!r}: no such file or program", USAGE])
    with open(program, "rb") as file:
        first = file.readline()
    if not first.startswith(b"#!") or b"python" not in first:
        raise ConfigError("not a Python program", [program, USAGE])
    return False, program, words[1:]


def _inside(launcher: str) -> str:
    return (
        f"{launcher} starts new Python processes, in which MOE_LORA would not be registered; put this module inside "
        f"it: {launcher} ... -m moe_lora_interop.peft_run SCRIPT ARGUMENTS"
    )


if __name__ == "__main__":
    try:
        sys.exit(execute(sys.argv[1:], Shell(quiet=True)))
    except ConfigError as error:
        sys.exit(f"moe_lora_interop.peft_run: {error}")
