"""Files that look like another program's: refused by name, whichever reader is asked."""

import json
import shutil

import pytest

import moe_lora_interop
from moe_lora_interop.disk import files
from tests.peers_data import Peer

ERRORS = (moe_lora_interop.CheckpointError, moe_lora_interop.ConfigError)


def test_the_full_state_under_the_name_of_an_adapter(tmp_path):
    """MeteoRA's model.safetensors beside the config of one of its tasks looks most like an ordinary LoRA."""
    shutil.copy(Peer("meteora/top1").directory / "model.safetensors", tmp_path / files.WEIGHTS_NAME)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / files.CONFIG_NAME).write_text(json.dumps(config))
    for dialect in (None, "lora"):
        with pytest.raises(moe_lora_interop.CheckpointError, match="lora: no rule for|moe_gate.*unexpected tensor"):
            moe_lora_interop.read(tmp_path, dialect)


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
