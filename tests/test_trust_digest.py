"""Flipped bits: every one in the tensors' file is found, and in the config every one that changes what it says."""

import json
import shutil

import numpy as np
import pytest
import xxhash

import moe_lora_interop
from moe_lora_interop import CheckpointError, ConfigError
from moe_lora_interop.checkpoint.inspection import verify
from moe_lora_interop.config.adapter_config import BOOKKEEPING
from tests.adapters import make_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    moe_lora_interop.write(
        make_adapter(dtype="bfloat16", router_bias=True, top_k=2, base_model_name_or_path="a/base"), tmp_path / "out"
    )
    return tmp_path / "out"


def flipped(raw: bytes, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def readers(tmp_path):
    """Everything that has to notice: the three ways to read an adapter."""
    return {
        "read": lambda directory: moe_lora_interop.read(directory),
        "convert": lambda directory: moe_lora_interop.convert(directory, tmp_path / "converted"),
        "verify": lambda directory: raise_errors(verify(directory)),
    }


def raise_errors(findings) -> None:
    if errors := [f.message for f in findings if f.level == "error"]:
        raise CheckpointError("verify", errors)


def is_found(reader, directory) -> bool:
    try:
        reader(directory)
    except (CheckpointError, ConfigError):
        return True
    return False


def test_every_flipped_bit_of_the_tensors_file_is_found(saved, tmp_path, tries, tally):
    raw = (saved / WEIGHTS).read_bytes()
    header = 8 * (8 + int.from_bytes(raw[:8], "little"))
    chance, count = np.random.default_rng(0), tries(100, 1000)
    bits = [*chance.integers(0, header, count).tolist(), *chance.integers(header, 8 * len(raw), count).tolist()]
    lost = []
    for n, bit in enumerate(bits):
        (saved / WEIGHTS).write_bytes(flipped(raw, bit))
        name, reader = list(readers(tmp_path).items())[n % 3]
        if not is_found(reader, saved):
            lost.append((name, bit, flipped(raw, bit)[max(0, bit // 8 - 20) : bit // 8 + 20]))
    assert not lost, lost[:3]
    assert not (tmp_path / "converted").exists()
    tally("bits flipped in the tensors' file", tried=len(bits), lost=len(lost))


def test_every_flipped_bit_of_the_config_is_refused_or_changes_nothing_that_is_computed(saved, tries, tally):
    """What is accepted says the same (another space between tokens), or differs in a bookkeeping field only."""
    raw = (saved / CONFIG).read_bytes()
    before, expected = moe_lora_interop.read(saved), json.loads(raw)
    bits = range(8 * len(raw)) if tries(0, 1) else np.random.default_rng(0).integers(0, 8 * len(raw), 300).tolist()
    kinds = {"refused": 0, "the same": 0, "bookkeeping": 0}
    lost = []
    for bit in bits:
        changed = flipped(raw, bit)
        (saved / CONFIG).write_bytes(changed)
        try:
            config = moe_lora_interop.read(saved).config
        except (CheckpointError, ConfigError):
            kinds["refused"] += 1
            continue
        said = json.loads(changed)
        differ = {k for k in said.keys() | expected.keys() if said.get(k) != expected.get(k)}
        if not differ and config == before.config:
            kinds["the same"] += 1
        elif config.semantic_dict() == before.config.semantic_dict() and stands_for(differ, expected) <= set(
            BOOKKEEPING
        ):
            kinds["bookkeeping"] += 1
        else:
            lost.append((bit, differ))
    assert not lost, lost[:5]
    assert kinds["refused"] > 0.8 * len(bits) and kinds["bookkeeping"], kinds
    tally("bits flipped in the config", tried=len(bits), lost=len(lost))


def stands_for(names: set[str], known: dict) -> set[str]:
    """A null field under a misspelt name is an unknown null field: it is ignored, like those of newer PEFT versions."""
    return {n for n in names if n in known}


def test_load_adapter_checks_the_digest_and_inspect_does_not(saved, tries, tally):
    from moe_lora_jax import load_adapter
    from tests.toy import Toy

    raw = (saved / WEIGHTS).read_bytes()
    chance, lost, count = np.random.default_rng(1), 0, tries(10, 50)
    start = 8 * (8 + int.from_bytes(raw[:8], "little"))
    expected = moe_lora_interop.inspect(saved)
    for bit in chance.integers(start, 8 * len(raw), count).tolist():
        (saved / WEIGHTS).write_bytes(flipped(raw, bit))
        assert moe_lora_interop.inspect(saved) == expected
        with pytest.raises(CheckpointError, match="digest"):
            load_adapter(Toy(), saved)
    tally("damaged files given to load_adapter", tried=count, lost=lost)


def rewritten(directory, metadata) -> None:
    """The same tensors under other header metadata, as another program would write them."""
    raw = (directory / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = {**json.loads(raw[8 : 8 + length]), "__metadata__": metadata}
    text = json.dumps(header).encode()
    (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_a_file_without_a_digest_is_read_and_verify_says_so(saved):
    expected = moe_lora_interop.read(saved)
    rewritten(saved, {"format": "pt"})
    assert moe_lora_interop.read(saved).config == expected.config
    (finding,) = verify(saved)
    assert finding.level == "note" and "no digest" in finding.message and "PEFT writes none" in finding.message


def test_unknown_metadata_are_findings(saved):
    """With a digest they are damage; without one they are noted, each by name."""
    metadata = moe_lora_interop.inspect(saved).metadata
    rewritten(saved, {**metadata, "author": "me"})
    (finding,) = verify(saved)
    assert finding.level == "error" and "digest" in finding.message
    rewritten(saved, {"format": "pt", "author": "me", "trained_on": "x"})
    said = [f.message for f in verify(saved)]
    assert any("'author'" in m for m in said) and any("'trained_on'" in m for m in said) and len(said) == 3


def test_the_digest_covers_header_bytes_and_config_and_no_more(saved, tmp_path):
    """Computed here from the files' bytes alone; the bookkeeping fields of PEFT may be anything."""
    raw = (saved / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__")
    stated = metadata.pop("digest")
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    config = json.loads((saved / CONFIG).read_text())
    bookkeeping = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version")
    described = {
        "config": {k: v for k, v in config.items() if k not in bookkeeping},
        "metadata": metadata,
        "tensors": [[k, names[header[k]["dtype"]], header[k]["shape"]] for k in sorted(header)],
    }
    text = json.dumps(described, sort_keys=True).encode()
    content = b"".join(data[slice(*header[k]["data_offsets"])] for k in sorted(header))
    assert stated == "xxh3-128:" + xxhash.xxh3_128(text + content).hexdigest()
    shutil.copytree(saved, tmp_path / "edited")
    edited = {**config, "base_model_name_or_path": "x", "revision": "y", "inference_mode": True, "peft_version": "9"}
    (tmp_path / "edited" / CONFIG).write_text(json.dumps(edited))
    assert [f for f in verify(tmp_path / "edited") if f.level == "error"] == []
