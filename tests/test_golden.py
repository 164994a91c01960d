"""Directories written once, by format version 1 and in every layout: they load forever, and mean what they meant.

`tests/golden/make.py` wrote them, and what they compute by the formula in numpy. Never edit one: fix the code.
"""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file
from test_peft_support import THIRD_PARTY_WARNINGS

import moe_lora_interop
import moe_lora_interop.peft_tuner  # noqa: F401  registers
import moe_lora_jax as mlj
from tests.golden.make import BASE, Recorder, main, manifest, summary
from tests.golden.variants import NATIVE

pytestmark = THIRD_PARTY_WARNINGS
ROOT = BASE.parent
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FILES = (WEIGHTS, CONFIG)


class Golden:
    def __init__(self, path: Path):
        self.directory = path / "adapter"
        self.description = json.loads((path / "golden.json").read_text("utf-8"))
        with np.load(path / "outputs.npz") as archive:
            outputs = dict(archive)
        self.ids, self.logits, self.gates = (outputs[name] for name in ("ids", "logits", "gates"))
        self.task_ids = outputs.get("task_ids")

    def read(self) -> moe_lora_interop.Adapter:
        return moe_lora_interop.read(self.directory, **self.description["options"])


NAMES = sorted(path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/*/golden.json"))
OURS = [name for name in NAMES if name.startswith("native/")]


@pytest.fixture
def golden(request):
    return Golden(ROOT / request.param)


every_golden = pytest.mark.parametrize("golden", NAMES, indirect=True)
every_native_golden = pytest.mark.parametrize("golden", OURS, indirect=True)


def test_there_is_one_for_every_layout_and_variant():
    layouts = {Path(name).name for name in NAMES if name.startswith("layouts/")} | {"native"}
    assert layouts == {d.name for d in moe_lora_interop.dialects.registry.file_dialects() if not d.read_only}
    assert {Path(name).name for name in OURS} == NATIVE.keys()


def test_an_existing_one_is_never_written_again(capsys):
    before = {path: path.stat().st_mtime_ns for path in ROOT.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    main([])
    after = {path: path.stat().st_mtime_ns for path in ROOT.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert after == before and capsys.readouterr().out.count("never written again") == len(NAMES)


@every_golden
def test_it_is_read_as_it_was_written(golden, tally):
    assert manifest(golden.directory) == golden.description["stored"]
    assert moe_lora_interop.detect(golden.directory) == golden.description["layout"]
    adapter = golden.read()
    found = {f"{module}:{role}": summary(tensor) for (module, role), tensor in adapter.tensors.items()}
    assert found == golden.description["tensors"]
    assert adapter.config.to_dict() == golden.description["config"] | adapter_bookkeeping(adapter, golden)
    tally("golden directories read", tried=1, lost=0)


def adapter_bookkeeping(adapter, golden):
    """What a layout's own program does not write is not compared, in other layouts than ours."""
    native = golden.description["layout"] == "native"
    return (
        {}
        if native
        else {name: getattr(adapter.config, name) for name in moe_lora_interop.config.adapter_config.BOOKKEEPING}
    )


@every_golden
def test_written_again_it_is_the_same(golden, tmp_path):
    layout = golden.description["layout"]
    moe_lora_interop.write(golden.read(), tmp_path, layout)
    again = moe_lora_interop.read(tmp_path, layout, **golden.description["options"])
    assert again.config == golden.read().config
    assert {f"{m}:{role}": summary(t) for (m, role), t in again.tensors.items()} == golden.description["tensors"]
    if layout == "native" and golden.description["written_by"] == "interop":
        for name in FILES:
            assert (tmp_path / name).read_bytes() == (golden.directory / name).read_bytes(), name


@every_golden
def test_the_formula_and_jax_compute_what_they_did(golden):
    adapter = golden.read()
    truth = Recorder(load_file(BASE / "model.safetensors"), json.loads((BASE / "config.json").read_text()), adapter)
    scale = np.abs(golden.logits).max()  # a logit near 0 is a sum that cancels; BLAS adds in the processor's own order
    np.testing.assert_allclose(truth.logits(golden.ids, golden.task_ids), golden.logits, rtol=1e-12, atol=1e-14 * scale)
    np.testing.assert_allclose(np.concatenate([np.zeros(0), *truth.gates]), golden.gates, rtol=1e-12)

    if any("float16" in summary for summary in golden.description["tensors"].values()):  # bfloat16 too
        tensors = {slot: tensor.astype(np.float32) for slot, tensor in adapter.tensors.items()}
        model = mlj.load_adapter(
            mlj.load_base_model(BASE), moe_lora_interop.Adapter(adapter.config, tensors)
        )  # see layers.py:
    else:  # the delta is computed in the dtype of A and B, and the formula in float64
        model = mlj.load_adapter(mlj.load_base_model(BASE), golden.directory, **golden.description["options"])
    tasks = {} if golden.task_ids is None else {"task_ids": jnp.asarray(golden.task_ids)}
    logits = nnx.jit(lambda model, ids: model(ids, **tasks))(model, jnp.asarray(golden.ids))
    np.testing.assert_allclose(logits, golden.logits, atol=1e-5 * scale)


@every_native_golden
def test_peft_computes_what_it_did(golden):
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    plain = base(torch.tensor(golden.ids)).logits.detach().numpy()
    model = peft.PeftModel.from_pretrained(base, golden.directory).eval()
    tasks = golden.task_ids
    with torch.no_grad(), nullcontext() if tasks is None else model.base_model.task_routing(tasks):
        logits = model(torch.tensor(golden.ids)).logits.numpy()
    scale = np.abs(golden.logits).max()
    assert np.abs(plain - golden.logits).max() > 1e-2 * scale
    np.testing.assert_allclose(logits, golden.logits, atol=1e-5 * scale)


# --- versions ---


def copy_with(golden, directory, **fields):
    config = json.loads((golden.directory / CONFIG).read_text("utf-8")) | fields
    (directory / CONFIG).write_text(json.dumps(config), "utf-8")
    (directory / WEIGHTS).write_bytes((golden.directory / WEIGHTS).read_bytes())
    return directory


def of_interop(directory):
    moe_lora_interop.read(directory)


def of_jax(directory):
    mlj.load_adapter(mlj.load_base_model(BASE), directory)


def of_peft(directory):
    peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(BASE), directory)


readers = pytest.mark.parametrize("read", [of_interop, of_jax, of_peft])
one = pytest.mark.parametrize("golden", ["native/minimal"], indirect=True)


@one
@readers
def test_a_newer_version_is_refused_by_name(golden, read, tmp_path):
    directory = copy_with(golden, tmp_path, format_version=3, from_the_future=1, r="another meaning")
    with pytest.raises(
        moe_lora_interop.ConfigError, match="upgrade moe-lora-jax to a release that reads version 3"
    ) as error:
        read(directory)
    assert len(error.value.problems) == 1


@one
@readers
def test_an_unknown_field_of_a_known_version_is_refused(golden, read, tmp_path):
    with pytest.raises(moe_lora_interop.ConfigError, match="from_the_future: unknown field with value 0"):
        read(copy_with(golden, tmp_path, from_the_future=0))


@one
@readers
def test_a_null_field_of_a_newer_peft_is_not(golden, read, tmp_path):
    read(copy_with(golden, tmp_path, from_a_newer_peft=None))


def test_every_field_of_pefts_own_config_is_known():
    """Or PEFT would write a field with a value, that reading refuses."""
    ours = {field.name for field in dataclasses.fields(moe_lora_interop.MoeLoraConfig)}
    assert {field.name for field in dataclasses.fields(peft.PeftConfig)} <= ours
