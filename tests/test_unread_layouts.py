"""Adapters of programs whose layout is not read: refused by name, whichever reader is asked."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import moe_lora_interop
from moe_lora_interop.dialects.registry import file_dialects
from moe_lora_interop.disk import files, torch_files
from tests.peers_data import Peer
from tests.test_peers import OPTIONS

FOLDER = Path(__file__).parent / "peers_refused"
REFUSED = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
NAMES = {
    "coin-adapter": "CoIN",
    "coin-trainer": "CoIN",
    "comol-core_router": "CoMoL",
    "meteora-top1": "MeteoRA",
    "mtl_lora-mtl_lora": "MTL-LoRA",
    "xlora_original-depth1": "X-LoRA's own program",
}
ERRORS = (moe_lora_interop.CheckpointError, moe_lora_interop.ConfigError)
every = pytest.mark.parametrize("case", NAMES)


def directory(root, case, **fields):
    """The program's directory with random values; `fields` are set in its adapter_config.json."""
    rng = np.random.default_rng(0)
    for name, config in REFUSED[case]["configs"].items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({**config, **fields}))
    for name, shapes in REFUSED[case]["tensors"].items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: rng.standard_normal(shape).astype("f4") for key, shape in shapes.items()}
        if name.endswith(".safetensors"):
            files.write_tensors(root / name, tensors, {"format": "pt"})
        else:
            torch_files.write(root / name, tensors)
    return root


def test_every_file_is_tried():
    assert REFUSED.keys() == NAMES.keys()


@every
def test_detection_names_the_program(case, tmp_path):
    with pytest.raises(ERRORS) as error:
        moe_lora_interop.detect(directory(tmp_path, case))
    assert error.value.problems[0].startswith(f"written by {NAMES[case]} (")
    assert sum("written by" in problem for problem in error.value.problems) == 1


@every
def test_no_reader_takes_it(case, tmp_path):
    made = directory(tmp_path, case)
    for dialect in (None, *(d.name for d in file_dialects())):
        with pytest.raises(ERRORS) as error:
            moe_lora_interop.read(made, dialect, **OPTIONS.get(dialect, {}))
        assert error.value.problems[0].startswith(f"written by {NAMES[case]} ("), dialect
        assert len(error.value.problems) > 1, dialect


@every
def test_the_tensors_are_refused_whatever_peft_type_the_config_claims(case, tmp_path):
    """Nothing rests on the mark alone."""
    for number, table in enumerate(file_dialects()):
        claimed = table.const.get("peft_type", ("LORA",))[0]
        made = directory(tmp_path / str(number), case, peft_type=claimed, sparsegen_cfg=None)
        for dialect in (None, table.name):
            with pytest.raises(ERRORS):
                moe_lora_interop.read(made, dialect, **OPTIONS.get(dialect, {}))


def test_the_full_state_under_the_name_of_an_adapter(tmp_path):
    """MeteoRA's model.safetensors beside the config of one of its tasks looks most like an ordinary LoRA."""
    made = directory(tmp_path, "meteora-top1")
    (made / "model.safetensors").rename(made / files.WEIGHTS_NAME)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}
    (made / files.CONFIG_NAME).write_text(json.dumps(config))
    for dialect in (None, "lora"):
        with pytest.raises(moe_lora_interop.CheckpointError, match=r"written by MeteoRA \("):
            moe_lora_interop.read(made, dialect)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sparsegen_cfg", {"enabled": True}),
        ("sparsegen_cfg", {"hidden_sizes": 12}),
        ("sparsegen_cfg", True),
        ("sparsegen", True),
        ("modules_to_save", ["score", "embed_tokens"]),
    ],
)
def test_the_layout_that_ld_mole_borrows_is_right_only_without_sparsegen(field, value, tmp_path):
    """Nothing rests on the tensors alone, either."""
    shutil.copytree(Peer("ld_mole/softmax").directory, tmp_path / "made")
    path = tmp_path / "made" / files.CONFIG_NAME
    assert moe_lora_interop.read(path.parent).config.scoring_func == "softmax"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    for dialect in (None, "loramoe"):
        with pytest.raises(ERRORS, match=f"{field}: found "):
            moe_lora_interop.read(path.parent, dialect)
