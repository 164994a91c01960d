"""The notebooks: as they are committed, fit to be shown; run from top to bottom, at their parameters and at others.

A short run has some, a full one (`make notebooks`) all. They run in an empty directory: what they read they make.
"""

import ast
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM

PEERS = Path(__file__).parent / "peers"
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
LIMIT = 1_500_000  # bytes of all four
PLACES = re.compile(r"/(home|root|tmp|work|usr|opt|mnt|Users|private)/|[A-Z]:\\")
OTHER = {  # parameters
    "01": {"NUM_EXPERTS": 6, "TOP_K": 1, "TARGETS": ["q_proj", "down_proj"], "STEPS": 40},
    "02": {"NUM_EXPERTS": 6, "TOP_K": 1, "TARGETS": ["gate_proj", "down_proj"], "STEPS": 40},
    "03": {"NUM_EXPERTS": 6, "TOP_K": 1, "TARGETS": ["q_proj", "down_proj"], "STEPS": 40},
    "04": {
        "TOPICS": ["cooking", "weather", "code"],
        "TOP_K": 1,
        "TARGETS": ["v_proj", "down_proj"],
        "STEPS": 40,
        "ROUTER_STEPS": 40,
    },
}
SHORT = {("01", "defaults"), ("02", "defaults"), ("02", "others")}
named = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def outputs(path: Path) -> list[dict]:
    return [output for cell in code_cells(path) for output in cell["outputs"]]


def tagged(cells: list[dict], tag: str) -> dict:
    (found,) = [cell for cell in cells if tag in cell["metadata"].get("tags", ())]
    return found


def with_parameters(path: Path, values: dict) -> nbformat.NotebookNode:
    """The notebook with other values in its one cell of parameters."""
    notebook = nbformat.read(path, as_version=4)
    cell = tagged(notebook.cells, "parameters")
    for name, value in values.items():
        cell.source, count = re.subn(rf"^{name} = .*", f"{name} = {value!r}", cell.source, flags=re.MULTILINE)
        assert count == 1, name
    return notebook


@named
@pytest.mark.parametrize("parameters", ["defaults", "others"])
def test_it_runs(path, parameters, tmp_path, request):
    """Assertions and plots included, whatever the parameters."""
    number = path.name[:2]
    if (number, parameters) not in SHORT and not request.config.getoption("--full"):
        pytest.skip("minutes: make notebooks")
    notebook = with_parameters(path, OTHER[number] if parameters == "others" else {})
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where).execute()


def test_there_are_four_and_they_are_small():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]
    assert sum(path.stat().st_size for path in NOTEBOOKS) <= LIMIT


@named
def test_one_cell_has_the_parameters_and_all_are_used(path):
    cells = code_cells(path)
    cell = tagged(cells, "parameters")
    assert cells.index(cell) == 1, "after the installation"
    assigned = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse("".join(cell["source"])).body}
    below = "".join(line for other in cells[2:] for line in other["source"])
    assert all(re.search(rf"\b{name}\b", below) for name in assigned)
    changed = {name for name, value in OTHER[path.name[:2]].items() if assigned[name] != value}
    assert changed == OTHER[path.name[:2]].keys()


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


@pytest.mark.parametrize(
    ("kind", "adapter", "base"),
    [("LoRAMoE", "loramoe/adapter", "bases/mha"), ("MixLoRA", "moe_peft/mixlora", "bases/moe_peft")],
)
def test_the_programs_of_notebook_two_compute_what_the_original_ones_did(kind, adapter, base, tmp_path):
    directory = PEERS / adapter
    names = {"json": json, "torch": torch, "nn": torch.nn, "AutoModelForCausalLM": AutoModelForCausalLM}
    exec("".join(tagged(code_cells(NOTEBOOKS[1]), "programs")["source"]), names)
    config = json.loads((directory / "adapter_config.json").read_text())
    program = names["Program"](names[kind], PEERS / base, config)

    file = torch.load(directory / "adapter_model.bin", weights_only=True)
    for key in [key for key in file if "self_attn" in key and "lora_A" in key]:  # MixLoRA's attention is plain LoRA
        a, b = file.pop(key), file.pop(key.replace("lora_A", "lora_B"))
        layer = key.replace("mixlora.", "model.").removesuffix(".lora_A.weight")
        program.model.get_submodule(layer).weight.data += config["lora_alpha"] / config["r"] * b @ a
    torch.save(file, tmp_path / "adapter_model.bin")
    program.load(tmp_path)

    reference = np.load(directory / "reference.npz")
    np.testing.assert_allclose(program.logits(reference["input_ids"]), reference["logits"], atol=1e-5)
    assert np.abs(reference["logits"] - reference["base_logits"]).max() > 0.3
