"""A directory is opened once: every file of it is opened once and parsed once, whatever is done with it."""

import builtins
import dataclasses
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import moe_lora_interop
from moe_lora_interop.checkpoint import read_write
from moe_lora_interop.checkpoint.read_write import opened
from moe_lora_interop.cli.main import main
from moe_lora_interop.dialects.adamole import ADAMOLE
from moe_lora_interop.dialects.registry import register_dialect
from moe_lora_interop.disk import files, limits
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_interop.rules import tensors as rules
from tests.adapters import assert_same_tensors, make_adapter
from tests.peers_data import Peer
from tests.test_lazy import Counted
from tools.samples import sample

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GOLDEN = Path(__file__).parent / "golden" / "native" / "top_k" / "adapter"
DIRECTORIES = {"native": GOLDEN} | {
    name: Peer(name).directory for name in ("poly/poly", "loramoe/adapter", "arrow/arrow", "xlora/depth2")
}
VERBS = {
    "detect": lambda source, target: moe_lora_interop.detect(source),
    "read": lambda source, target: moe_lora_interop.read(source),
    "inspect": lambda source, target: moe_lora_interop.inspect(source),
    "verify": lambda source, target: moe_lora_interop.verify(source),
    "convert": lambda source, target: moe_lora_interop.convert(source, target),
    "inspect in the shell": lambda source, target: main(["inspect", str(source)]),
    "verify in the shell": lambda source, target: main(["verify", str(source)]),
    "convert in the shell": lambda source, target: main(["convert", str(source), str(target), "--to", "native"]),
}


def files_of(directory):
    """Every file of the checkpoint; X-LoRA's and Arrow's experts may lie beside it."""
    config = json.loads((directory / CONFIG).read_text()) if (directory / CONFIG).exists() else {}
    router = directory / "arrow_router"
    if router.exists():
        named = json.loads((router / CONFIG).read_text())["arrow_config"]["task_adapter_names"]
        places = [router, *(directory / name for name in named)]
    else:
        places = [directory, *(directory / name for name in config.get("adapters", {}).values())]
    found = [file for place in places for file in (*place.glob("adapter_*.*"), *directory.glob("prototypes.npz"))]
    return sorted({file.resolve() for file in found})


def parsed_part(file):
    """What is JSON in a file."""
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        return content[8 : 8 + int.from_bytes(content[:8], "little")]
    return content if file.suffix == ".json" else None


@pytest.fixture
def counts(monkeypatch):
    """What was opened (by path), parsed (by content), and checked by the library of safetensors (by path)."""
    found = {"opened": Counter(), "parsed": Counter(), "checked": Counter()}

    def counting(kind, function, key):
        def count(first, *args, **kwargs):
            found[kind][key(first)] += 1
            return function(first, *args, **kwargs)

        return count

    def resolved(path):
        return Path(path).resolve() if isinstance(path, str | Path) else path

    for module in (builtins, io):
        monkeypatch.setattr(module, "open", counting("opened", open, resolved))
    monkeypatch.setattr(limits, "parsed_json", counting("parsed", limits.parsed_json, bytes))
    monkeypatch.setattr(files, "safe_open", counting("checked", files.safe_open, resolved))
    return found


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", DIRECTORIES)
def test_every_file_is_opened_and_parsed_once(name, verb, tmp_path, counts, capsys):
    directory = DIRECTORIES[name]
    expected = files_of(directory)
    assert len(expected) >= 2
    headers = [file for file in expected if file.suffix == ".safetensors"]
    parsed = Counter(part for file in expected if (part := parsed_part(file)) is not None)
    for counter in counts.values():
        counter.clear()
    VERBS[verb](directory, tmp_path / "target")
    assert {file: counts["opened"][file] for file in expected} == dict.fromkeys(expected, 1)
    assert {part: counts["parsed"][part] for part in parsed} == parsed
    assert {file: counts["checked"][file] for file in headers} == dict.fromkeys(headers, 1)


def test_every_name_is_matched_with_the_rules_once(monkeypatch):
    peer = Peer("poly/poly")
    expected = moe_lora_interop.inspect(peer.directory).tensors
    names, claim = Counter(), rules.claim
    monkeypatch.setattr(rules, "claim", lambda of, key, ndim: names.update([key]) or claim(of, key, ndim))
    moe_lora_interop.read(peer.directory, "poly")
    assert names == dict.fromkeys(expected, 1)


# --- what is read of the tensors --------------------------------------------------------------------------------------


@pytest.fixture
def tensor_bytes(monkeypatch):
    """The sizes of what is read of tensors."""
    counted = []
    monkeypatch.setattr(Counted, "tensor_bytes", counted, raising=False)
    monkeypatch.setattr(files, "opened", lambda path, what: Counted(io.FileIO(path)))
    return counted


@pytest.mark.parametrize("name", ["native", "poly/poly", "xlora/depth2", "arrow/arrow"])
def test_inspect_reads_headers_only(name, tensor_bytes):
    moe_lora_interop.inspect(DIRECTORIES[name])
    assert tensor_bytes == []
    assert moe_lora_interop.read(DIRECTORIES[name]).tensors and tensor_bytes


def test_duplicates_are_compared_once(tmp_path, tensor_bytes, monkeypatch):
    monkeypatch.setattr("moe_lora_interop.dialects.registry._registered", {})
    register_dialect(dataclasses.replace(ADAMOLE, name="adamole-st", weights=WEIGHTS))
    adapter = sample("adamole")
    moe_lora_interop.write(adapter, tmp_path, "adamole-st", duplicates=True)
    with_duplicates = sum(t.nbytes for (_, role), t in adapter.tensors.items() if role in ("lora_A", "lora_B"))
    everything = sum(t.nbytes for t in adapter.tensors.values())
    assert_same_tensors(moe_lora_interop.read(tmp_path, "adamole-st").tensors, adapter.tensors)
    assert sum(tensor_bytes) == everything + 2 * with_duplicates


@pytest.mark.filterwarnings("ignore:PEFT stores no Arrow prototypes")
def test_prototypes_are_computed_once(tmp_path, tensor_bytes):
    """A and B are read for them, and once more for themselves."""
    directory = tmp_path / "without"
    shutil.copytree(DIRECTORIES["arrow/arrow"], directory, ignore=shutil.ignore_patterns("*.npz"))
    infos = moe_lora_interop.inspect(directory).tensors
    of_experts = sum(4 * np.prod(info.shape) for name, info in infos.items() if not name.startswith("main/"))
    assert of_experts > 0 and {info.dtype for info in infos.values()} == {"F32"}
    moe_lora_interop.read(directory)
    assert sum(tensor_bytes) == 2 * of_experts


# --- what a reader finds while somebody saves -------------------------------------------------------------------------


def test_a_save_between_two_looks_is_noticed_and_read_anew(tmp_path, monkeypatch):
    old, new = make_adapter(seed=0, lora_alpha=1), make_adapter(seed=1, lora_alpha=2)
    moe_lora_interop.write(old, tmp_path)
    read_json, saves = files.read_json, []

    def save_after(path):
        config = read_json(path)
        if not saves:
            saves.append(path)
            moe_lora_interop.write(new, tmp_path)
        return config

    monkeypatch.setattr(files, "read_json", save_after)
    found = moe_lora_interop.read(tmp_path)
    assert saves and found.config == new.config
    assert_same_tensors(found.tensors, new.tensors)


@pytest.mark.parametrize("layout", ["xlora", "arrow"])
def test_so_is_one_in_a_layout_without_a_digest(tmp_path, monkeypatch, layout):
    """The save comes when one expert's file is open and the others' are not."""
    old, new = sample(layout, seed=0), sample(layout, seed=1)
    moe_lora_interop.write(old, tmp_path, layout)
    open_file, saves = files.opened, []

    def save_after(path, what):
        file = open_file(path, what)
        if not saves and path.suffix == ".safetensors":
            saves.append(path)
            moe_lora_interop.write(new, tmp_path, layout)
        return file

    monkeypatch.setattr(files, "opened", save_after)
    found = moe_lora_interop.read(tmp_path)
    assert saves
    assert_same_tensors(found.tensors, new.tensors)


def test_another_layout_appears_while_one_is_looked_for(tmp_path, monkeypatch):
    """Nothing is found at first; then the experts' folders are there."""
    moe_lora_interop.write(make_adapter(), tmp_path)
    experts, saves = read_write.Directory.names_experts, []

    def save_after(directory, folders):
        found = experts(directory, folders)
        if not saves:
            saves.append(folders)
            moe_lora_interop.write(sample("arrow"), tmp_path, "arrow")
        return found

    (tmp_path / CONFIG).write_text((tmp_path / CONFIG).read_text().replace("MOE_LORA", "OTHER"))
    monkeypatch.setattr(read_write.Directory, "names_experts", save_after)
    assert_same_tensors(moe_lora_interop.read(tmp_path).tensors, sample("arrow").tensors)


# --- native is a layout like any other --------------------------------------------------------------------------------


def test_a_config_of_ours_makes_the_layout_ours_and_the_errors_too(tmp_path):
    moe_lora_interop.write(sample("loramoe"), tmp_path, "loramoe")
    config = {"peft_type": "MOE_LORA", "format_version": 1, "target_modules": ["q_proj"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    for call in (moe_lora_interop.read, lambda path: opened(path).__enter__()):
        with pytest.raises(CheckpointError, match="is not a complete native adapter"):
            call(tmp_path)
    assert all("native" in f.message for f in moe_lora_interop.verify(tmp_path))
    (tmp_path / CONFIG).write_text(json.dumps(config | {"r": 0, "num_experts": "many"}))
    for call in (moe_lora_interop.read, moe_lora_interop.inspect):
        with pytest.raises(ConfigError, match="cannot be read as native") as error:
            call(tmp_path)
        assert [problem.split(":")[0] for problem in error.value.problems] == ["r", "num_experts"]


def test_an_open_adapter_says_its_layout_and_its_header():
    with opened(GOLDEN) as adapter:
        assert adapter.dialect.name == "native" and adapter.metadata["digest"].startswith("xxh3-128:")
    with opened(DIRECTORIES["xlora/depth2"]) as adapter:
        assert adapter.dialect.name == "xlora" and "digest" not in adapter.metadata


def test_features_and_routed_modules():
    adapter = make_adapter(num_experts_pattern={"v_proj": 1})
    q, v = ([f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1)] for p in "qv")
    assert adapter.routed == q
    assert adapter.features == {**dict.fromkeys(q, (5, 6)), **dict.fromkeys(v, (5, 3))}
    shared = make_adapter(shared_lora_A=True)
    assert shared.features == adapter.features and len(shared.routed) == 4
