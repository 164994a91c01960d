"""Hostile files: every reader refuses them in the documented way, in little memory and time, and touches nothing else.

The cases of `hostile_files` run one after another in a process of its own, which measures each: processor time, the
highest memory use above that before the case (less the size of its files), and the files opened.
`python -m tests.test_trust_hostile DIRECTORY` prints them.
"""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import moe_lora_interop
import moe_lora_interop.peft_tuner
from moe_lora_interop import CheckpointError, ConfigError
from moe_lora_interop.cli.main import main
from moe_lora_interop.disk.model_directory import BaseModel
from moe_lora_interop.export import export_mixtral
from moe_lora_jax import load_base_model
from moe_lora_jax.models.families import FAMILIES
from tests.hostile_files import CONFIG, WEIGHTS, corpus, entry, tensor_file
from tools.fuzz import HOSTILE, allowed, check, samples

ROOT = Path(__file__).resolve().parents[1]
SECONDS, MEGABYTES = 2.0, 200


def memory(name):
    """VmRSS or VmHWM in MB."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def readers(layout, source, target):
    """Every way in which a file is read: {name: function}."""
    options = {"options": {}} if layout != "for-ai-molora" else {"options": {"r": 2, "num_experts": 4}}
    return {
        "detect": lambda: moe_lora_interop.detect(source),
        "inspect": lambda: moe_lora_interop.inspect(source),
        "read": lambda: moe_lora_interop.read(source),
        f"read as {layout}": lambda: moe_lora_interop.read(source, layout, **options["options"]),
        "verify": lambda: moe_lora_interop.verify(source),
        "convert": lambda: moe_lora_interop.convert(source, target / "native"),
        "convert to mola": lambda: moe_lora_interop.convert(source, target / "mola", to="mola"),
        **{
            f"moe-lora {verb}": lambda words=words: exits(main, words)
            for verb, words in {
                "inspect": ["inspect", str(source)],
                "verify": ["verify", str(source)],
                "verify --json": ["verify", str(source), "--json"],
                "convert": ["convert", str(source), str(target / "shell"), "--to", "native"],
            }.items()
        },
    }


def exits(main, words):
    """An exit code that is documented, and an output without control characters."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    assert code in (0, 1, 2), f"exit code {code}"
    text = (out.getvalue() + err.getvalue()).replace("\n", "")
    text.encode()
    assert text.isprintable(), f"not printable: {[c for c in text if not c.isprintable()][:5]}"


def run_all(directory, count):
    """Prints one JSON line for each of `count` cases, chosen at random."""
    warnings.simplefilter("ignore")
    opened: list[str] = []
    outside = directory / "outside"
    for name, content in samples()["lora"].items():  # readable, so that reading it is a mistake and not an error
        outside.mkdir(exist_ok=True)
        (outside / name).write_bytes(content)
    marker = directory / "marker"
    for layout, files in samples().items():  # so that everything is imported
        check(layout, files, directory / "warm" / layout)
    import moe_lora_jax.models.loading  # noqa: F401

    for reader in readers("native", directory / "warm/native/source", directory / "warm/native/more").values():
        allowed(reader)
    watched = ("open", "os.system", "subprocess.Popen", "os.listdir", "os.scandir")
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event in watched else None)
    cases = list(corpus(outside, marker).items())
    random.Random(0).shuffle(cases)
    for number, (name, (layout, files)) in enumerate(cases[:count]):
        place = directory / f"case{number}"
        source, target = place / "source", place / "target"
        for path, content in files.items():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(content)
        os.chdir(place)  # files that are opened relative to a directory's descriptor look relative to this
        size = sum(len(content) for content in files.values()) / 1e6
        del files
        problems, slowest, highest = [], 0.0, 0.0
        for reader, call in readers(layout, source, target).items():
            opened.clear()
            before = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            start = time.process_time()
            try:
                allowed(call)
            except Exception as error:
                problems.append(f"{reader}: {type(error).__name__}: {str(error)[:200]}")
            seconds, grown = time.process_time() - start, memory("VmHWM") - before - size
            slowest, highest = max(slowest, seconds), max(highest, grown)
            if seconds > SECONDS:
                problems.append(f"{reader}: {seconds:.1f} s")
            if grown > MEGABYTES:
                problems.append(f"{reader}: {grown:.0f} MB above its files")
            beyond = {p for p in opened if not is_expected(p, place)}
            if beyond:
                problems.append(f"{reader}: opened {sorted(beyond)[:3]}")
        if marker.exists():
            problems.append("a command of the file was run")
            marker.unlink()
        print(json.dumps({"case": name, "problems": problems, "seconds": slowest, "megabytes": highest}), flush=True)


def is_expected(path, place):
    """Whether a file that was opened is the case's, or Python's own."""
    if (
        path in sys.path
        or path.isdigit()
        or path.startswith(("/proc/", "/dev/null", "/dev/shm", sys.prefix, sys.base_prefix))
    ):
        return True
    inside = (os.path.realpath(place), str(ROOT / "interop"), str(ROOT / "moe_lora_jax"))
    return os.path.realpath(path).startswith(inside)


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux reports it")
def test_hostile_files(tmp_path, tries, tally):
    command = [sys.executable, "-m", "tests.test_trust_hostile", str(tmp_path), str(tries(40, 1000))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    bad = {case["case"]: case["problems"] for case in cases if case["problems"]}
    assert not bad, json.dumps(bad, indent=1)
    tally("hostile files", tried=len(cases) * len(readers("native", tmp_path, tmp_path)), lost=0)


def test_hostile_values_in_every_field_of_every_layout(tmp_path, tries, tally):
    fields = [
        (layout, name, field)
        for layout, files in sorted(samples().items())
        for name in files
        if name.endswith(CONFIG)
        for field in json.loads(files[name])
    ]
    cases = [(*place, value) for place in fields for value in HOSTILE]
    chosen = random.Random(1).sample(cases, tries(150, len(cases)))
    for number, (layout, name, field, value) in enumerate(chosen):
        files = samples()[layout]
        config = json.loads(files[name]) | {field: value}
        try:
            check(layout, {**files, name: json.dumps(config).encode()}, tmp_path / str(number))
        except Exception as error:
            pytest.fail(f"{layout}: {name}: {field} = {str(value)[:50]!r}: {type(error).__name__}: {error}")
    tally("hostile config values", tried=len(chosen), lost=0)


def adapter_in(directory, layout="native"):
    for name, content in samples()[layout].items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "directory"])
def test_what_is_no_regular_file(tmp_path, kind, tally):
    """Reading these would wait for ever or never end."""
    make = {
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "loop": lambda path: path.symlink_to(path),
        "directory": os.mkdir,
    }[kind]
    tried = 0
    for layout in ("native", "mole", "arrow"):
        for name in samples()[layout]:
            source = adapter_in(tmp_path / f"{layout}{tried}", layout)
            (source / name).unlink()
            make(source / name)
            assert allowed(lambda source=source: moe_lora_interop.read(source)) is None or name == "prototypes.npz"
            assert allowed(lambda source=source: moe_lora_interop.inspect(source)) is None
            tried += 1
    tally("files that are none", tried=tried, lost=0)


def test_files_may_be_links_as_in_the_hubs_cache(tmp_path, tally):
    blobs, snapshot = adapter_in(tmp_path / "blobs"), tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for name in samples()["native"]:
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert moe_lora_interop.read(snapshot).config == moe_lora_interop.read(blobs).config
    tally("files that are none", tried=1, lost=0)


def test_a_folder_that_is_a_link_to_elsewhere_is_not_read(tmp_path, tally):
    source, elsewhere = adapter_in(tmp_path / "source", "arrow"), tmp_path / "elsewhere"
    (source / "task_0").rename(elsewhere)
    (source / "task_0").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="expected different folders inside"):
        moe_lora_interop.read(source, "arrow")
    tally("files that are none", tried=1, lost=0)


NAMES = [
    "[torch]",
    "[red]a[/]",
    ":warning:",
    "\x1b[2J\x1b]0;owned\x07",
    "a\nsound",
    "a\rb",
    "\u202egnp.exe",
    "\x9b31m",
    "a\\",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_are_printed_as_they_are_or_as_escapes(tmp_path, capsys, name, tally, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    module = f"model.{name}.q"
    config = moe_lora_interop.MoeLoraConfig(r=1, num_experts=1, target_modules=[module], base_model_name_or_path=name)
    tensors = {(module, "lora_A"): np.ones((1, 1, 2), "f4"), (module, "lora_B"): np.full((1, 3, 1), np.nan, "f4")}
    moe_lora_interop.write(moe_lora_interop.Adapter(config, tensors), tmp_path / "a")
    expected = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    for words, code in (["inspect", "a"], 0), (["verify", "a"], 1), (["convert", "a", "c", "--to", "poly"], 2):
        words = [words[0], *(str(tmp_path / w) if len(w) == 1 else w for w in words[1:])]
        assert main(words) == code
        printed = "".join(capsys.readouterr())
        assert printed.replace("\n", "").isprintable()
        assert expected in printed or words[0] == "convert"
        assert "\nsound" not in printed
    tally("names in a terminal", tried=3, lost=0)


# --- base models and the PEFT method --------------------------------------------------------------------------------

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    **{"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10},
    **{"num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 64},
    **{"rope_scaling": None, "rope_parameters": None, "head_dim": 4, "hidden_act": "silu", "layer_types": None},
    **{"eos_token_id": 1, "pad_token_id": None, "dtype": "float32", "sliding_window": None, "attention_bias": False},
}


def base_model_in(directory, config, weights):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    for name, content in weights.items():
        (directory / name).write_bytes(content)
    return directory


def readers_of_models(directory, adapter):
    return (
        lambda: load_base_model(directory),
        lambda: BaseModel(directory).close(),
        lambda: moe_lora_interop.verify(adapter, directory),
        lambda: export_mixtral(
            moe_lora_interop.read(adapter), directory, directory.parent / f"{directory.name}-mixtral"
        ),
    )


def test_hostile_base_models(tmp_path, tries, tally):
    adapter = adapter_in(tmp_path / "adapter", "mixlora")
    one = tensor_file({"model.norm.weight": entry((8,), end=32)}, b"\0" * 32)
    index = "model.safetensors.index.json"
    cases = [({**LLAMA, field: value}, {"model.safetensors": one}) for field in LLAMA for value in HOSTILE]
    cases += [
        ({**LLAMA, "architectures": [name], field: value}, {"model.safetensors": one})
        for name in FAMILIES
        for field in ("layer_types", "sliding_window", "num_hidden_layers", "rope_parameters", "max_window_layers")
        for value in HOSTILE
    ]
    cases = random.Random(2).sample(cases, tries(150, len(cases)))
    cases += [(LLAMA, {index: json.dumps({"weight_map": value}).encode()}) for value in HOSTILE]
    cases += [(LLAMA, {index: json.dumps({"weight_map": {"model.norm.weight": v}}).encode()}) for v in HOSTILE]
    cases += [(value, {"model.safetensors": one}) for value in ([], None, "a", {"x": [[[]]]})]
    for content in (b"", b"\xff", b"[" * 5000, b"{}" * 9, tensor_file(b"{}", length=2**62)):
        cases += [(LLAMA, {index: content}), (LLAMA, {"model.safetensors": content})]
    for number, (config, weights) in enumerate(cases):
        directory = base_model_in(tmp_path / str(number), config, weights)
        for reader in readers_of_models(directory, adapter):
            start = time.process_time()
            try:
                allowed(reader)
            except Exception as error:
                pytest.fail(f"{str(config)[:600]} {str(weights)[:200]}: {type(error).__name__}: {error}")
            assert time.process_time() - start < SECONDS, config
    tally("hostile base models", tried=4 * len(cases), lost=0)


class Linears(torch.nn.Module):
    def __init__(self):
        super().__init__()
        nested = torch.nn.ModuleDict
        layers = [
            nested({"self_attn": nested({f"{name}_proj": torch.nn.Linear(8, 12) for name in "qv"})}) for _ in range(2)
        ]
        self.model = nested({"layers": torch.nn.ModuleList(layers)})

    def forward(self, x):
        return x


PEFT_REFUSES = (CheckpointError, ConfigError, ValueError, OSError, SafetensorError, TypeError, KeyError, RecursionError)


def test_hostile_files_in_peft(tmp_path, tries, tally):
    """PEFT parses the files itself and has its own errors for them. It may load a value that means something; none may
    hang it or raise anything else."""
    from peft import PeftModel

    config = json.loads(samples()["native"][CONFIG])
    cases = [(field, value) for field in config for value in HOSTILE]
    # PEFT 0.21.2 itself matches these with `re`, for any method, and one expression takes minutes: its `inject_adapter`
    theirs = ("rank_pattern", "alpha_pattern", "exclude_modules")
    cases = [(field, value) for field, value in cases if not (field in theirs and "(.*)*" in str(value))]
    cases = random.Random(3).sample(cases, tries(60, len(cases)))
    cases += [("target_modules", "(a+)+b"), ("num_experts_pattern", {"(.*)*b": 2})]
    weights = samples()["native"][WEIGHTS]
    for number, (field, value) in enumerate(cases):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / CONFIG).write_text(json.dumps({**config, field: value}))
        (directory / WEIGHTS).write_bytes(weights)
        start = time.process_time()
        with warnings.catch_warnings(), contextlib.suppress(*PEFT_REFUSES):
            warnings.simplefilter("ignore")
            PeftModel.from_pretrained(Linears(), directory)
        assert time.process_time() - start < SECONDS, (field, value)
    tally("hostile files in PEFT", tried=len(cases), lost=0)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float8_e4m3fn", "complex64"])
def test_tensors_of_other_dtypes_do_not_load_in_peft(tmp_path, dtype, tally):
    from peft import PeftModel, get_peft_model
    from safetensors.torch import load_file, save_file

    model = get_peft_model(Linears(), moe_lora_interop.peft_tuner.MoeLoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros(tensors[name].shape).to(getattr(torch, dtype))
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}: .*{dtype}"):
        PeftModel.from_pretrained(Linears(), tmp_path)
    tally("hostile files in PEFT", tried=1, lost=0)


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), int(sys.argv[2]))
