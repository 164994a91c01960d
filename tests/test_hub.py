"""push_to_hub and hub ids, against a hub on this machine: PEFT and huggingface_hub do the work.

The clients are processes of their own, because huggingface_hub reads HF_ENDPOINT when it is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import fake_hub

ROOT = Path(__file__).resolve().parents[1]

PUSH = """
import huggingface_hub, peft, transformers
from test_peft_support import config, tiny_llama
tiny_llama().push_to_hub("user/base")
base = transformers.AutoModelForCausalLM.from_pretrained("user/base")
model = peft.get_peft_model(base, config(task_type="CAUSAL_LM", top_k=2)).eval()
assert model.peft_config["default"].base_model_name_or_path == "user/base"
model.push_to_hub("user/adapter")
model.save_pretrained("saved")  # PEFT 0.21 ignores push_to_hub=True here without a word
huggingface_hub.create_repo("user/saved")
huggingface_hub.upload_folder(repo_id="user/saved", folder_path="saved")
"""

LOAD = """
import peft, torch, transformers
from test_peft_support import logits, tiny_llama
import moe_lora_interop.peft_tuner
again = peft.PeftModel.from_pretrained(tiny_llama(), "user/adapter").eval()
base, found = logits(tiny_llama()), logits(again)
assert not torch.equal(found, base)
again.load_adapter("user/saved", "second")
again.set_adapter("second")
assert torch.equal(logits(again), found)
whole = peft.AutoPeftModelForCausalLM.from_pretrained("user/adapter")  # the base from the hub too
assert torch.equal(logits(whole), found)
native = transformers.AutoModelForCausalLM.from_pretrained("user/adapter").eval()
assert torch.equal(logits(native), found)
assert peft.PeftConfig.from_pretrained("user/adapter").num_experts == 3
"""

UNREGISTERED = """
import peft
from transformers import LlamaConfig, LlamaForCausalLM
try:
    peft.PeftConfig.from_pretrained("user/adapter")
except KeyError as error:
    print(error)
"""


def client(code: str, address: str, folder: Path) -> str:
    folder.mkdir()
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": "hf_of_the_fake_hub",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub to which `PUSH` has pushed."""
    folder = tmp_path_factory.mktemp("hub")
    with fake_hub() as (address, repositories, unknown):
        client(PUSH, address, folder / "push")
        yield address, repositories, unknown


def test_push(hub):
    _, repositories, unknown = hub
    assert unknown == []
    assert set(repositories) == {"user/base", "user/adapter", "user/saved"}
    for repo in ("user/adapter", "user/saved"):
        assert set(repositories[repo]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        config = json.loads(repositories[repo]["adapter_config.json"])
        assert config["peft_type"] == "MOE_LORA" and config["base_model_name_or_path"] == "user/base"


def test_load_by_id(hub, tmp_path):
    address, _, unknown = hub
    client(LOAD, address, tmp_path / "load")
    assert unknown == []


def test_without_the_import_the_error_names_the_method(hub, tmp_path):
    assert client(UNREGISTERED, hub[0], tmp_path / "load").strip() == "'MOE_LORA'"
