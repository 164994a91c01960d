"""`moe-lora convert` and `moe-lora layouts`."""

import dataclasses
import json

import numpy as np
import pytest
import tyro

import moe_lora_interop
from moe_lora_interop.cli.convert import convert, describe, layouts, parse_options
from moe_lora_interop.dialects.registry import file_dialects
from tests.adapters import make_adapter
from tests.peers_data import Peer

MOLA = Peer("mola/adapter")


def run(verb, *args):
    return tyro.cli(verb, args=list(map(str, args)))


def test_a_layout_is_detected_and_written_as_another(tmp_path, capsys):
    peer = Peer("adamole/mole_topk")
    run(convert, peer.directory, tmp_path / "native", "--to", "native")
    assert "(mole) -> " in capsys.readouterr().out
    run(convert, tmp_path / "native", tmp_path / "mole", "--to", "mole", "--from", "native")
    assert moe_lora_interop.detect(tmp_path / "mole") == "mole"
    expected, found = moe_lora_interop.read(peer.directory), moe_lora_interop.read(tmp_path / "mole")
    assert expected.tensors.keys() == found.tensors.keys()
    assert all(found.tensors[slot].tobytes() == t.tobytes() for slot, t in expected.tensors.items())


def test_options_that_the_source_does_not_record(tmp_path, capsys):
    with pytest.raises(moe_lora_interop.ConfigError, match="option top_k: missing, and the layout does not record it"):
        run(convert, MOLA.directory, tmp_path / "out", "--to", "native")
    assert not (tmp_path / "out").exists()
    top_k = json.dumps(MOLA.options["top_k"])
    run(convert, MOLA.directory, tmp_path / "out", "--to", "native", "--option", f"top_k={top_k}")
    assert (
        moe_lora_interop.read(tmp_path / "out").config == moe_lora_interop.read(MOLA.directory, **MOLA.options).config
    )
    capsys.readouterr()
    run(convert, tmp_path / "out", tmp_path / "back", "--to", "mola")
    assert f"to read it back: --option top_k='{top_k}'" in capsys.readouterr().out


def test_a_file_as_an_option(tmp_path):
    peer = Peer("arrow/arrow")
    run(convert, peer.directory, tmp_path / "out", "--to", "native")
    module = moe_lora_interop.read(tmp_path / "out").modules[0]
    with np.load(peer.directory / "prototypes.npz") as archive:
        negated = {name: -archive[name] for name in archive.files}
    np.savez(tmp_path / "p.npz", **negated)
    option = f"prototypes={tmp_path / 'p.npz'}"
    run(convert, peer.directory, tmp_path / "other", "--to", "native", "--option", option)
    first, second = (moe_lora_interop.read(tmp_path / d).tensors[module, "router"] for d in ("out", "other"))
    np.testing.assert_array_equal(first, -second)


def test_a_loss_is_an_error_that_names_the_field_unless_allowed(tmp_path):
    moe_lora_interop.write(make_adapter(top_k=2, router_aux_loss="localized"), tmp_path / "native")
    with pytest.raises(moe_lora_interop.ConfigError) as error:
        run(convert, tmp_path / "native", tmp_path / "out", "--to", "loramoe")
    assert error.value.problems == ("top_k: 2 would be read back as None",)
    run(convert, tmp_path / "native", tmp_path / "out", "--to", "loramoe", "--allow-loss", "top_k")
    assert moe_lora_interop.read(tmp_path / "out").config.top_k is None
    with pytest.raises(moe_lora_interop.ConfigError, match="allow_loss: 'topk' is no field"):
        run(convert, tmp_path / "native", tmp_path / "x", "--to", "loramoe", "--allow-loss", "topk")


def test_mixlora_names_targets_by_their_last_part(tmp_path):
    """Its loaders skip any other name in silence, and the experts with it (mixlora 0.2.3, config.py)."""
    adapter = moe_lora_interop.read(Peer("moe_peft/mixlora").directory)
    moe_lora_interop.write(adapter, tmp_path / "out", "mixlora")
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"]
    assert sorted(written) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    partly = {slot: t for slot, t in adapter.tensors.items() if slot[0] != "model.layers.1.self_attn.q_proj"}
    fewer = dataclasses.replace(adapter.config, target_modules=sorted({m for m, r in partly if r == "lora_B"}))
    with pytest.raises(moe_lora_interop.ConfigError, match="target_modules: layer 1 lacks q_proj"):
        moe_lora_interop.write(moe_lora_interop.Adapter(fewer, partly), tmp_path / "partly", "mixlora")


def test_duplicates_are_written_on_request(tmp_path):
    peer = Peer("adamole/adamole")
    run(convert, peer.directory, tmp_path / "native", "--to", "native")
    run(convert, tmp_path / "native", tmp_path / "single", "--to", "adamole")
    run(convert, tmp_path / "native", tmp_path / "double", "--to", "adamole", "--duplicates")
    sizes = [(tmp_path / d / "adapter_model.bin").stat().st_size for d in ("single", "double")]
    assert sizes[1] > 1.5 * sizes[0]
    moe_lora_interop.read(tmp_path / "double")


def test_a_used_target_and_unknown_layouts(tmp_path):
    moe_lora_interop.write(make_adapter(), tmp_path / "native")
    with pytest.raises(moe_lora_interop.CheckpointError, match="not empty"):
        run(convert, tmp_path / "native", tmp_path / "native", "--to", "native")
    with pytest.raises(moe_lora_interop.CheckpointError, match="found 'nativ', expected one of"):
        run(convert, tmp_path / "native", tmp_path / "out", "--to", "nativ")
    with pytest.raises(moe_lora_interop.CheckpointError, match="found 'nativ', expected one of"):
        run(convert, tmp_path / "native", tmp_path / "out", "--to", "native", "--from", "nativ")


def test_options_are_json_or_text():
    found = parse_options(("a=2", "b=[1, null]", "c=hidden", "d=/x=y.npz", "e=", 'f="2"', "g=true"))
    assert found == {"a": 2, "b": [1, None], "c": "hidden", "d": "/x=y.npz", "e": "", "f": "2", "g": True}
    with pytest.raises(moe_lora_interop.ConfigError) as error:
        parse_options(("top_k", "=1", "a=1", "a=2"))
    assert error.value.problems == (
        "option: found 'top_k', expected NAME=VALUE",
        "option: found '=1', expected NAME=VALUE",
        "option a: given twice",
    )


def test_layouts_lists_every_layout(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run(layouts)
    shown = capsys.readouterr().out
    run(layouts, "--json")
    listed = {d["name"]: d for d in json.loads(capsys.readouterr().out)}
    assert listed.keys() == {d.name for d in file_dialects()} and all(name in shown for name in listed)
    assert listed["mola"]["options"][0] == {
        "name": "top_k",
        "what": "experts kept per token: a number, or a list with one per layer",
        "required": True,
    }
    assert listed["hydralora"]["implies"]["shared_lora_A"] is True
    assert "top_k" in listed["mole"]["records"] and "top_k" not in listed["loramoe"]["records"]
    assert "top_k*" in shown and "router_bias:" in shown


@pytest.mark.parametrize("dialect", file_dialects(), ids=lambda d: d.name)
def test_every_layout_says_what_it_cannot_express(dialect):
    described = describe(dialect)
    assert described["notes"] and described["source"] and "." in described["file"]
