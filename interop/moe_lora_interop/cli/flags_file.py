"""`--config FILE` of a verb: the same flags, written down in YAML as {name: value}."""

import argparse
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from moe_lora_interop.disk.atomic import replace_file
from moe_lora_interop.errors import ConfigError, expected

Verb = Callable[..., Any]


def with_file(verb: Verb, args: Sequence[str]) -> list[str]:
    """Puts the flags of the file that `--config` names before the others, which therefore win.

    A verb takes part by having a parameter `config`.

    Raises:
        ConfigError: the file cannot be read, or names what is no flag of the verb (each with the nearest that is).
    """
    if "config" not in inspect.signature(verb).parameters:
        return list(args)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    found, rest = parser.parse_known_args(list(args))
    return list(args) if found.config is None else [*flags(verb, Path(found.config)), *rest]


def flags(verb: Verb, file: Path) -> list[str]:
    """The file as command-line arguments. Values are checked where those of the command line are."""
    import yaml

    try:
        values = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("cannot read the configuration", [f"{file}: {error}"]) from error
    if not isinstance(values, dict):
        problem = f"{file}: found {type(values).__name__}, expected a mapping"
        raise ConfigError("cannot read the configuration", [problem])
    known = [name for name in flag_names(verb) if name != "config"] + list(_short_names(verb))
    problems = [f"{name}: unknown, {expected(str(name), known)}" for name in values if name not in known]
    problems += [f"{k}: found a mapping, expected a value or a list" for k, v in values.items() if isinstance(v, dict)]
    twice = [(short, name) for short, name in _short_names(verb).items() if {short, name} <= values.keys()]
    problems += [f"{short}: found beside {name}, expected one of the two" for short, name in twice]
    if problems:
        raise ConfigError(f"{file} does not fit this verb", problems)
    return [flag for name, value in values.items() for flag in _flag(name.replace("_", "-"), value)]


def write_file(file: Path, values: Mapping[str, Any]) -> None:
    """The file that `flags` reads: paths as text, tuples as lists."""
    import yaml

    plain = {k: list(v) if isinstance(v, tuple) else str(v) if isinstance(v, Path) else v for k, v in values.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode())


def flag_names(verb: Verb) -> list[str]:
    """The flags of a verb: its parameters, and the fields of those that are a group of flags, a dataclass."""
    hints, names = get_type_hints(verb), list[str]()
    for name in inspect.signature(verb).parameters:
        hint = hints.get(name)
        names += [f.name for f in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else [name]
    return names


def _short_names(verb: Verb) -> dict[str, str]:
    """{another name of a flag of a group: the flag}, from the flags' annotations."""
    hints = get_type_hints(verb)
    groups = [hint for hint in hints.values() if dataclasses.is_dataclass(hint)]
    return {
        alias.removeprefix("--").replace("-", "_"): name
        for group in groups
        for name, hint in get_type_hints(group, include_extras=True).items()
        for note in getattr(hint, "__metadata__", ())
        for alias in getattr(note, "aliases", None) or ()
    }


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]
