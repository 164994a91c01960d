"""The notebooks as they are committed: run from top to bottom, and fit to be shown. `make notebooks` runs them."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
LIMIT = 1_500_000  # bytes of all four
PLACES = re.compile(r"/(home|root|tmp|work|usr|opt|mnt|Users|private)/|[A-Z]:\\")
named = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def outputs(path: Path) -> list[dict]:
    return [output for cell in code_cells(path) for output in cell["outputs"]]


def test_there_are_four_and_they_are_small():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]
    assert sum(path.stat().st_size for path in NOTEBOOKS) <= LIMIT


@named
def test_every_cell_was_run_in_order(path):
    counts = [cell["execution_count"] for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@named
def test_claims_are_asserted(path):
    """What makes `make notebooks` fail when a claim no longer holds."""
    assert sum("assert" in "".join(cell["source"]) for cell in code_cells(path)) >= 3


@named
def test_outputs_have_figures_and_no_errors_warnings_or_places_of_one_machine(path):
    found = outputs(path)
    assert sum("image/png" in output.get("data", {}) for output in found) >= 2
    assert [o for o in found if o["output_type"] == "error" or o.get("name") == "stderr"] == []
    for output in found:
        texts = [output.get("text", "")] + [v for k, v in output.get("data", {}).items() if k.startswith("text/")]
        for text in texts:
            assert not PLACES.search("".join(text))


@named
def test_no_times_are_recorded(path):
    assert all("execution" not in cell["metadata"] for cell in code_cells(path))
