"""The example of CONTRIBUTING.md: a layout that this repository does not know, registered from outside."""

import re
from pathlib import Path

import numpy as np
import pytest

import moe_lora_interop
from moe_lora_interop.dialects import registry

EXAMPLE = Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    (code,) = re.findall(r"```python\n(.*?)```", EXAMPLE.read_text("utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 30
    exec(compile(code, str(EXAMPLE), "exec"), {})


def adapter(**fields):
    rng = np.random.default_rng(0)
    config = moe_lora_interop.MoeLoraConfig(
        r=2, num_experts=3, target_modules=["l.0.q", "l.1.q"], **{"top_k": 2, **fields}
    )
    tensors = {}
    for module in config.target_modules:
        for role, shape in (("lora_A", (3, 2, 5)), ("lora_B", (3, 4, 2)), ("router", (3, 5))):
            tensors[module, role] = rng.normal(size=shape).astype(np.float32)
    return moe_lora_interop.Adapter(config, tensors)


def test_it_is_written_detected_and_read_back_bit_for_bit(mine, tmp_path):
    before = adapter()
    moe_lora_interop.write(before, tmp_path, "mine")
    assert moe_lora_interop.detect(tmp_path) == "mine"
    after = moe_lora_interop.read(tmp_path)
    assert after.config == before.config
    assert all(after.tensors[slot].tobytes() == t.tobytes() for slot, t in before.tensors.items())


def test_what_it_cannot_express_is_named(mine, tmp_path):
    with pytest.raises(moe_lora_interop.ConfigError, match="lora_dropout: 0.5 would be read back as 0.0"):
        moe_lora_interop.write(adapter(lora_dropout=0.5), tmp_path, "mine")
    moe_lora_interop.write(adapter(lora_dropout=0.5), tmp_path, "mine", allow_loss=["lora_dropout"])


def test_its_name_must_be_new():
    with pytest.raises(moe_lora_interop.CheckpointError, match="'native': another layout has this name"):
        registry.register_dialect(moe_lora_interop.rules.dialect.Dialect(name="native", source="", rules=()))
