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
from tiny_training import small_dirs  # noqa: F401  a fixture

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

PUSH_VERB = """
import json, pathlib
import moe_lora_interop
from moe_lora_interop.cli.push import push
def files(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
def answer(folder, repo, **options):
    try:
        return push(folder, repo, **options)
    except moe_lora_interop.CheckpointError as error:
        return str(error)
adapter = moe_lora_interop.read("../push/saved")
mine, damaged, other = map(pathlib.Path, ("mine", "damaged", "other"))
for folder in (mine, damaged):
    moe_lora_interop.write(adapter, folder)
moe_lora_interop.write(adapter, other, "mole")
(mine / "training").mkdir()
(mine / "training" / "checkpoint").write_bytes(b"large")
(mine / "tokenizer.json").write_text("{}")
(mine / "private.json").write_text("{}")
weights = bytearray((damaged / "adapter_model.safetensors").read_bytes())
weights[-3] ^= 1
(damaged / "adapter_model.safetensors").write_bytes(weights)
before = files(mine)
answers = {"new": answer(mine, "user/pushed", private=True), "again": answer(mine, "user/pushed", private=True)}
answers["public"] = answer(mine, "user/base", private=True)
answers["name"] = answer(mine, "no such name!")
assert files(mine) == before
(mine / "README.md").write_text("# Mine")
answers |= {"own card": answer(mine, "user/mine"), "damaged": answer(damaged, "user/damaged")}
answers["layout"] = answer(other, "user/other")
print("ANSWERS " + json.dumps(answers))
"""

BLOCKS = """
import re
import numpy as np
from huggingface_hub import hf_hub_download
from test_peft_support import input_ids, logits
card = open(hf_hub_download("user/pushed", "README.md")).read()
of_peft, of_jax = re.findall("```python\\n(.*?)```", card, re.DOTALL)
peft, jax = {}, {}
exec(of_peft, peft)
exec(of_jax, jax)
expected = logits(peft["model"].eval()).numpy()
assert np.abs(expected - logits(peft["model"].unload()).numpy()).max() > 1e-3
np.testing.assert_allclose(jax["model"](input_ids().numpy()), expected, atol=1e-5)
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
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "interop"), str(ROOT / "tests")]),
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
        yield address, repositories, unknown, folder


def test_push(hub):
    _, repositories, unknown, _ = hub
    assert unknown == []
    assert set(repositories) == {"user/base", "user/adapter", "user/saved"}
    for repo in ("user/adapter", "user/saved"):
        assert set(repositories[repo]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        config = json.loads(repositories[repo]["adapter_config.json"])
        assert config["peft_type"] == "MOE_LORA" and config["base_model_name_or_path"] == "user/base"


def test_load_by_id(hub, tmp_path):
    address, _, unknown, _ = hub
    client(LOAD, address, tmp_path / "load")
    assert unknown == []


def test_without_the_import_the_error_names_the_method(hub, tmp_path):
    assert client(UNREGISTERED, hub[0], tmp_path / "load").strip() == "'MOE_LORA'"


def test_the_verb_pushes_what_is_sound_and_nothing_else(hub, tmp_path):
    address, repositories, unknown, folder = hub
    folder = folder / "verb"
    said = client(PUSH_VERB, address, folder)
    answers = json.loads(said.partition("ANSWERS ")[2])
    assert [answers[name] for name in ("new", "again", "own card", "damaged")] == [0, 0, 0, 1]
    assert "private: found a public repository of this name" in answers["public"]
    assert "no such name!" in answers["name"]
    assert "found layout mole, expected native: `moe-lora convert` writes it" in answers["layout"]
    assert "user/damaged" not in repositories and "user/other" not in repositories
    pushed = repositories["user/pushed"]
    assert set(pushed) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert pushed[name] == (folder / "mine" / name).read_bytes()
    assert repositories["user/mine"]["README.md"] == b"# Mine"
    assert 'from_pretrained(base_model, "user/pushed")' in pushed["README.md"].decode()
    client(BLOCKS, address, tmp_path / "blocks")  # what the card says, as a stranger runs it
    assert unknown == []


IDS = """
import json, os, sys
import jax.numpy as jnp, numpy as np, torch, transformers, peft
import moe_lora_interop, moe_lora_interop.peft_tuner, moe_lora_jax as mlj
from moe_lora_interop.cli.main import main
from moe_lora_jax.train import load_tokenizer
model = mlj.load_base_model("user/base", dtype="float32")
assert model.config.name_or_path.endswith("0" * 40), model.config.name_or_path
mlj.load_adapter(model, "user/adapter")
ids = np.arange(12).reshape(2, 6) % 7
base = transformers.AutoModelForCausalLM.from_pretrained("user/base")
theirs = peft.PeftModel.from_pretrained(base, "user/adapter").eval()(torch.tensor(ids)).logits.detach().numpy()
np.testing.assert_allclose(np.asarray(model(jnp.asarray(ids))), theirs, atol=1e-5)
again = moe_lora_interop.read("user/adapter", revision="main")
assert again.config.num_experts == 3
mlj.abstract_base_model("user/config_only", dtype="float32")
answers = {}
for name, call in {
    "nobody": lambda: mlj.load_base_model("user/nobody"),
    "revision": lambda: mlj.load_base_model(".", revision="v1"),
    "weights": lambda: mlj.load_base_model("user/config_only"),
    "tokenizer": lambda: load_tokenizer("user/base"),
}.items():
    try:
        answers[name] = str(call())
    except moe_lora_interop.CheckpointError as error:
        answers[name] = str(error)
open("data.jsonl", "w").write('{"text": "hi there"}\\n' * 4)
words = ["--model", "user/whole", "--data", "data.jsonl", "--steps", "1", "--num-experts", "2", "--r", "2", "--quiet"]
assert not main(["train", *words, "--output-dir", "out", "--batch-size", "2"])
assert not main(["generate", "--model", "user/whole", "--adapter", "out", "--prompt", "hi", "--max-new-tokens", "2"])
assert not main(["inspect", "user/adapter", "--quiet"])
config = json.load(open("out/adapter_config.json"))
answers["base"] = [config["base_model_name_or_path"], config["revision"]]
cached = os.path.join(os.environ["HF_HOME"], "hub")
answers["files"] = sorted(f for _, _, files in os.walk(cached + "/models--user--whole/snapshots") for f in files)
print("ANSWERS " + json.dumps(answers))
"""


def test_models_and_adapters_by_id_in_jax(hub, tmp_path, small_dirs):  # noqa: F811
    """What is downloaded is what is needed; the cache serves offline; errors say both where it was looked for."""
    address, repositories, unknown, _ = hub
    files = {path.name: path.read_bytes() for path in small_dirs["base"].iterdir()}
    others = {"consolidated.safetensors": b"large", "pytorch_model.bin": b"large", "README.md": b"# Model"}
    repositories["user/whole"] = files | others
    repositories["user/config_only"] = {"config.json": files["config.json"]}
    said = client(IDS, address, tmp_path / "online")
    answers = json.loads(said.partition("ANSWERS ")[2])
    assert "found no such directory" in answers["nobody"] and "404" in answers["nobody"]
    assert "revision: found 'v1' with '.', expected an id on the Hub" in answers["revision"]
    assert "neither model.safetensors nor model.safetensors.index.json" in answers["weights"]
    assert "expected tokenizer.json or" in answers["tokenizer"]
    assert answers["base"] == ["user/whole", "0" * 40]
    assert set(answers["files"]) == files.keys()
    assert unknown == []
    cached = 'import moe_lora_jax as mlj; print(type(mlj.load_base_model("user/whole")).__name__)'
    cached = f'import os; os.environ |= {{"HF_HUB_OFFLINE": "1", "HF_HOME": "{tmp_path}/online/home"}}; {cached}'
    assert client(cached, "http://127.0.0.1:9", tmp_path / "offline").strip() == "CausalLM"
    push = f'from moe_lora_interop.cli.main import main; print(main(["push", "{hub[3]}/push/saved", "user/x"]))'
    assert client(f'import os; os.environ["HF_HUB_OFFLINE"] = "1"; {push}', address, tmp_path / "push").strip() == "2"
