"""Every layout into every other, through files: `python -m tools.conversion_matrix`."""

import pytest

import moe_lora_interop
from moe_lora_interop.dialects.registry import dialect_named, file_dialects
from tests.peers_data import READABLE
from tools import conversion_matrix as matrix
from tools.conversion_matrix import Cell, convert_once, details, table
from tools.samples import SAMPLES, sample

pytestmark = pytest.mark.filterwarnings("ignore:.*left out. ")  # MeteoRA's files have the whole base
# Writing needs a codec that does not exist for these values: codecs raise TypeError instead of naming the field.


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr("moe_lora_interop.disk.atomic._sync", lambda path: None)


def test_every_layout_that_is_written_has_a_sample():
    assert SAMPLES.keys() == {d.name for d in file_dialects() if not d.read_only}


@pytest.mark.parametrize("layout", SAMPLES)
def test_each_layout_converts_to_itself_and_to_native_exactly(layout):
    adapter = sample(layout)
    assert convert_once(adapter, "native") == Cell("exact")
    assert convert_once(adapter, layout) == Cell("exact")


@pytest.mark.parametrize("peer", READABLE, ids=lambda p: p.name)
def test_each_peer_converts_to_its_own_layout_exactly(peer):
    adapter = moe_lora_interop.read(peer.directory, **peer.options)
    layout = moe_lora_interop.detect(peer.directory)
    read_only = Cell("impossible", (f"{layout} is read and not written",))
    assert convert_once(adapter, layout) == (read_only if dialect_named(layout).read_only else Cell("exact"))


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("mole", "moe-peft-mola", Cell("exact")),
        ("mole", "mola", Cell("exact")),
        ("mole", "goat", Cell("exact")),
        ("goat", "mole", Cell("exact")),
        ("mixlora", "mixlora-legacy", Cell("exact")),
        ("mixlora-legacy", "mixlora", Cell("exact")),
        ("peft-router", "xlora", Cell("exact")),
        ("mole", "loramoe", Cell("lossy", ("router_aux_loss", "top_k"))),
        ("arrow", "mole", Cell("lossy", ("scoring_func",))),
        ("adamole", "mole", Cell("impossible", ("adaptive_threshold", "threshold"))),
        ("loramoe", "mola", Cell("impossible", ("top_k",))),
        ("poly", "moelora", Cell("impossible", ("router_depth",))),
        ("mola", "peft-router", Cell("impossible", ("num_experts",))),
    ],
)
def test_pairs(source, target, expected):
    found = convert_once(sample(source), target)
    assert found.status == expected.status and set(expected.fields) <= set(found.fields)
    if expected.status == "lossy":
        assert set(found.fields) == set(expected.fields)


def test_the_whole_matrix_prints(capsys):
    matrix.main(["--details"])
    out = capsys.readouterr().out
    assert out.startswith("| from \\ to | native |") and "| mole | loramoe | lossy |" in out


def test_the_tables():
    cells = {
        ("a", "b"): Cell("exact"),
        ("a", "c"): Cell("lossy", ("top_k",)),
        ("d", "b"): Cell("impossible", ("mix", "r")),
    }
    cells["d", "c"] = Cell("exact")
    assert list(table(cells)) == ["| from \\ to | b | c |", "|---|:-:|:-:|", "| a | = | ~ |", "| d | . | = |"]
    assert list(details(cells))[2:] == ["| a | c | lossy | top_k |", "| d | b | impossible | mix, r |"]


def test_a_silent_change_is_a_bug(monkeypatch):
    monkeypatch.setattr(matrix, "_equal", lambda found, expected: False)
    with pytest.raises(AssertionError, match="tensors differ after mole"):
        convert_once(sample("mole"), "mole")
