"""Damaged and hostile checkpoints for every reader: `make fuzz` lets atheris look for bytes that reach new code.

Bytes choose a sample in some layout and what is done to its files (`damaged`); then every reader is called (`check`).
A reader may raise CheckpointError or ConfigError, and nothing else; what it accepts must survive a conversion. The
tests run the same target with seeded random bytes.

    python tools/fuzz.py [--minutes 10] [CORPUS_DIRECTORY]
"""

import argparse
import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 8, 2**16, 2**31, 2**40, 2**63, 2**64, 10**400, -(2**63), 0.5, 1e-320, 1e308),
    *(
        "",
        "a",
        "../..",
        "/etc",
        "\0",
        "\ud800",
        "\x1b[31m",
        "[red]",
        "all-linear",
        "(a+)+$",
        "(",
        "x" * 5000,
        "1" * 5000,
    ),
    *([], [[]], [None], [1, "a"], ["a"], ["../../x"], {}, {"0": ".."}, {"a": 1}, {"(.*)*x": 2}, {"0": {}}),
)
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "")


class Choices:
    """Choices made by bytes; when they run out every choice is the first."""

    def __init__(self, data: bytes):
        self._data, self._place = data, 0

    def number(self, end: int) -> int:
        """0 <= number < end."""
        value = int.from_bytes(self._take(2), "little")
        return value % end

    def of(self, options: Any) -> Any:
        """One of a non-empty sequence."""
        return options[self.number(len(options))]

    def rest(self) -> bytes:
        """All that is left."""
        return self._take(len(self._data))

    def _take(self, count: int) -> bytes:
        taken = self._data[self._place : self._place + count]
        self._place += count
        return taken


@functools.cache
def samples() -> dict[str, dict[str, bytes]]:
    """{layout: {relative file name: bytes}} of a small sound adapter in each layout."""
    from moe_lora_interop import write
    from tools.samples import SAMPLES, sample

    found = {}
    for layout in SAMPLES:
        with tempfile.TemporaryDirectory() as scratch:
            write(sample(layout), scratch, layout)
            paths = [path for path in sorted(Path(scratch).rglob("*")) if path.is_file() and path.suffix != ".md"]
            found[layout] = {str(path.relative_to(scratch)): path.read_bytes() for path in paths}
    return found


def damaged(data: bytes) -> tuple[str, dict[str, bytes]]:
    """The layout that the bytes choose, and its files after the changes that they choose."""
    choices = Choices(data)
    layout = choices.of(sorted(samples()))
    files = dict(samples()[layout])
    for _ in range(1 + choices.number(3)):
        name = choices.of(sorted(files))
        change = _bytes_changed
        if choices.number(4):
            change = _json_changed if name.endswith(".json") else _header_changed
        changed = change(choices, files[name])
        if changed is None:
            del files[name]
            return layout, files
        files[name] = changed
    return layout, files


def _bytes_changed(choices: Choices, content: bytes) -> bytes | None:
    kind = choices.number(5)
    if kind == 0 or not content:
        return None
    place = choices.number(len(content))
    if kind == 1:
        return content[:place]
    if kind == 2:
        return content[:place] + bytes([choices.number(256)]) + content[place + 1 :]
    if kind == 3:
        return content[:place] + choices.rest() + content[place:]
    return choices.rest()


def _json_changed(choices: Choices, content: bytes) -> bytes:
    try:
        return json.dumps(_value_changed(choices, json.loads(content))).encode()
    except ValueError:  # an earlier change has made it something else
        return content + choices.rest()


def _value_changed(choices: Choices, value: Any) -> Any:
    """A copy with one value in it replaced, removed or added."""
    if isinstance(value, dict) and value and choices.number(8):
        key = choices.of(sorted(value))
        if choices.number(6) == 1:
            return {k: v for k, v in value.items() if k != key}
        if choices.number(12) == 1:
            return {choices.of([str(h) for h in HOSTILE[:40]]) if k == key else k: v for k, v in value.items()}
        return {**value, key: _value_changed(choices, value[key])}
    if isinstance(value, list) and value and choices.number(4):
        place = choices.number(len(value))
        return [_value_changed(choices, v) if i == place else v for i, v in enumerate(value)]
    return choices.of(HOSTILE)


def _header_changed(choices: Choices, content: bytes) -> bytes:
    """A safetensors file with another header; other files get other bytes."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        name = choices.of(sorted(header))
        entry = dict(header[name])
        kind = choices.number(6)
        if kind == 0:
            entry["dtype"] = choices.of(DTYPES)
        elif kind == 1:
            entry["shape"] = [choices.of((0, 1, 2, 3, 4, 8, 2**40, 2**63, -1)) for _ in range(choices.number(4))]
        elif kind == 2:
            entry["shape"] = [*entry["shape"][::-1]]
        elif kind == 3:
            entry["data_offsets"] = header[choices.of(sorted(header))]["data_offsets"]
        if kind > 3:
            mutated = name.replace(
                choices.of("0123.aB_m"), choices.of(("", "1", "9" * 9, "9" * 5000, "..", "\x1b", "/"))
            )
            header = {mutated if n == name else n: e for n, e in header.items()}
        else:
            header = {**header, name: entry}
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]
    except (ValueError, KeyError, TypeError, AttributeError):
        return _bytes_changed(choices, content) or b""


def check(layout: str, files: dict[str, bytes], directory: Path) -> bool:
    """Calls every reader on these files, in an empty directory; True if the adapter was read.

    Raises:
        Exception: anything that is not a CheckpointError or ConfigError: a bug.
    """
    import moe_lora_interop

    source, target = directory / "source", directory / "target"
    for name, content in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    source.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for reader in (moe_lora_interop.detect, moe_lora_interop.inspect):
            allowed(lambda reader=reader: reader(source))
        findings = moe_lora_interop.verify(source)
        named, found = (
            allowed(lambda: moe_lora_interop.read(source, layout)),
            allowed(lambda: moe_lora_interop.read(source)),
        )
        if found is None:
            assert any(finding.level == "error" for finding in findings), "verify finds nothing that read refuses"
        for adapter in (named, found):
            if adapter is not None and allowed(lambda a=adapter: moe_lora_interop.write(a, target) or True):
                back = moe_lora_interop.read(target)
                assert back.config == adapter.config, "another config after a conversion"
                assert back.tensors.keys() == adapter.tensors.keys(), "other tensors after a conversion"
                assert all(back.tensors[k].tobytes() == t.tobytes() for k, t in adapter.tensors.items()), "other values"
    return found is not None


def allowed(call: Callable[[], Any]) -> Any:
    """What the call returns, or None if it refuses in the documented way."""
    from moe_lora_interop import CheckpointError, ConfigError

    try:
        return call()
    except (CheckpointError, ConfigError) as error:
        assert error.problems or error.what
        str(error).encode()  # can be printed
        return None


def one_input(data: bytes) -> None:
    """The fuzz target."""
    layout, files = damaged(data)
    with tempfile.TemporaryDirectory() as directory:
        check(layout, files, Path(directory))


def main() -> None:
    """Runs the target under atheris until the time is over or something is found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("corpus", nargs="?", help="a directory of inputs that reached new code, read and added to")
    arguments = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=["moe_lora_interop"]):
        import moe_lora_interop  # noqa: F401
        import tools.samples  # noqa: F401
    samples()
    corpus = [arguments.corpus] if arguments.corpus else []
    options = [f"-max_total_time={round(60 * arguments.minutes)}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=256"]
    atheris.Setup([sys.argv[0], *options, *corpus], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
