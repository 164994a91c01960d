"""The patch that docs/peft-entry-point.md proposes, applied to the PEFT that is installed: no import is needed then."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest

import moe_lora_interop.peft_tuner as tuner
from tests.hf import make_model, save_model

ROOT = Path(__file__).resolve().parents[1]
PATCH = re.search(r"```diff\n(.*?)```", (ROOT / "docs" / "peft-entry-point.md").read_text(), re.DOTALL)[1]
WAYS = {
    "config": 'assert peft.PeftConfig.from_pretrained("adapter").num_experts == 3',
    "model": 'check(peft.PeftModel.from_pretrained(base(), "adapter"))',
    "auto": 'check(peft.AutoPeftModelForCausalLM.from_pretrained("adapter"))',
    "transformers": 'check(transformers.AutoModelForCausalLM.from_pretrained("adapter"))',
    "load_adapter": 'model = base(); model.load_adapter("adapter"); check(model)',
    "config dict": 'assert peft.get_peft_config({"peft_type": "MOE_LORA", "format_version": 1, "r": 2}).r == 2',
}
SCRIPT = """
import numpy as np, peft, torch, transformers
ids, logits = (torch.tensor(a) for a in np.load("expected.npz").values())
def base():
    return transformers.AutoModelForCausalLM.from_pretrained("base")
def check(model):
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, logits, atol=1e-5, rtol=0)  # eager there, SDPA here
try:
    peft.PEFT_TYPE_TO_CONFIG_MAPPING["NOBODYS"]
except KeyError as error:
    assert "NOBODYS" in str(error)
"""
ATTEMPT = """
try:
    {code}
except Exception as error:
    print({name!r}, repr(error))
else:
    print({name!r}, "fine")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An adapter, its base, what they compute, and a copy of PEFT."""
    import numpy as np
    import torch

    made = tmp_path_factory.mktemp("proposal")
    base = make_model("llama")
    save_model(base, made / "base")
    config = tuner.MoeLoraConfig(r=2, num_experts=3, top_k=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.peft_config["default"].base_model_name_or_path = str(made / "base")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        np.savez(made / "expected.npz", ids=ids.numpy(), logits=model(ids).logits.numpy())
    model.peft_config["default"].task_type = "CAUSAL_LM"
    model.save_pretrained(made / "adapter")
    shutil.copytree(Path(peft.__file__).parent, made / "src" / "peft", ignore=shutil.ignore_patterns("__pycache__"))
    return made


def outcomes(folder):
    """A line for every way in a process that never imports us."""
    tried = "".join(ATTEMPT.format(code=code, name=name) for name, code in WAYS.items())
    search = os.pathsep.join([str(folder / "src"), *(path for path in sys.path if path)])
    environment = {**os.environ, "PYTHONPATH": search, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT + tried],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if line]


def test_with_the_patch_no_way_needs_the_import(folder):
    before = outcomes(folder)
    assert len(before) == len(WAYS) and all("MOE_LORA" in line for line in before), before
    subprocess.run(["git", "apply", "-"], input=PATCH, text=True, cwd=folder, check=True)
    after = outcomes(folder)
    assert after == [f"{name} fine" for name in WAYS]
