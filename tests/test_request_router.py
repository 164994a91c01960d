"""The example of a router that decides for a whole request: against each adapter alone, in JAX and in PEFT."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from test_peft_support import THIRD_PARTY_WARNINGS

import moe_lora_interop
import moe_lora_interop.peft_tuner as tuner
import moe_lora_jax as mlj
from tests.peers_data import ROOT

pytestmark = THIRD_PARTY_WARNINGS
BASE = ROOT / "bases" / "gqa"
LORAS = [ROOT / "xlora" / "experts" / f"expert_{n}" for n in range(4)]
IDS = np.random.default_rng(0).integers(3, 90, (5, 7))
TASKS = np.array([2, 0, 3, 1, 4])  # the last is the average


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parent.parent / "examples" / "request_router.py"
    spec = importlib.util.spec_from_file_location("request_router", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expected():
    """Each request with its own adapter alone, as PEFT computes it; the average as PEFT adds them."""
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, LORAS[0], adapter_name="e0")
    for n in range(1, 4):
        model.load_adapter(LORAS[n], adapter_name=f"e{n}")
    model.add_weighted_adapter([f"e{n}" for n in range(4)], [0.25] * 4, "e4", combination_type="cat")
    model.eval()  # the new adapter's dropout too
    rows = []
    for ids, task in zip(IDS, TASKS, strict=True):
        model.set_adapter(f"e{task}")
        with torch.no_grad():
            rows.append(model(torch.tensor(ids[None])).logits[0].numpy())
    return np.stack(rows)


def test_every_request_gets_the_adapter_of_its_id(example, expected, tmp_path):
    adapter = example.by_request(LORAS)
    model = mlj.load_adapter(mlj.load_base_model(BASE), adapter)
    logits = model(jnp.asarray(IDS), task_ids=jnp.asarray(TASKS))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert np.abs(np.asarray(model(jnp.asarray(IDS), task_ids=jnp.asarray(TASKS[::-1]))) - expected).max() > 0.1

    moe_lora_interop.write(adapter, tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad(), tuner.task_routing(model, TASKS):
        np.testing.assert_allclose(model(torch.tensor(IDS)).logits.numpy(), expected, atol=1e-4)


def test_the_first_pass_is_the_bases_and_the_nearest_centre_decides(example):
    model = mlj.load_adapter(mlj.load_base_model(BASE), example.by_request(LORAS))
    mask = np.array([[1] * 7, [1] * 5 + [0] * 2, [1] * 7, [1] * 3 + [0] * 4, [1] * 7])
    found = example.request_vectors(model, jnp.asarray(IDS), jnp.asarray(mask))
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.no_grad():
        hidden = base.model(torch.tensor(IDS), attention_mask=torch.tensor(mask))[0].numpy()
    means = np.stack([row[real == 1].mean(0) for row, real in zip(hidden, mask, strict=True)])
    np.testing.assert_allclose(found, means, atol=1e-5)
    centres = jnp.asarray(means[[3, 0, 4, 1]])
    assert example.nearest(found, centres).tolist()[:2] == [1, 3]
    assert example.nearest(found, centres)[jnp.asarray([3, 4])].tolist() == [0, 2]
