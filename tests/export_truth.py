"""What an export must compute: the base with every delta merged into its weights, in torch. No test of its own."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.peers_data import ROOT

IDS = np.random.default_rng(7).integers(3, 120, (2, 9))


def torch_base(name):
    return AutoModelForCausalLM.from_pretrained(ROOT / "bases" / name, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(torch.as_tensor(ids)).logits.numpy()


def stock_logits(base, directory, ids=IDS):
    """The logits of a directory that stock PEFT loads on the base; every tensor of the file must be used."""
    model = PeftModel.from_pretrained(torch_base(base), directory)
    config = json.loads((Path(directory) / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    return logits(model, ids)


def merged_logits(base, deltas, ids=IDS):
    """The logits of the base with W + delta for {module: delta [out, in]}."""
    model = torch_base(base)
    for module, delta in deltas.items():
        weight = model.get_submodule(module).weight
        with torch.no_grad():
            weight += torch.as_tensor(np.asarray(delta, np.float32))
    return logits(model, ids)


@cache
def base_logits(base):
    return logits(torch_base(base))


def deltas_of(adapter, gates):
    """{module: sum_e g_e s_e B_e A_e}, from the formula; `gates(module, E)` gives [expert]."""
    config, deltas = adapter.config, {}
    for module in adapter.modules:
        sizes = config.for_module(module)
        a, b = adapter.tensors[module, "lora_A"], adapter.tensors[module, "lora_B"]
        own = gates(module, sizes.num_experts) if sizes.num_experts > 1 else [1.0]
        deltas[module] = sum(
            own[e]
            * (sizes.alphas[e] / (sizes.ranks[e] ** (0.5 if config.use_rslora else 1)))
            * (b[e].astype(np.float64) @ a[0 if config.shared_lora_A else e].astype(np.float64))
            for e in range(sizes.num_experts)
        )
    return deltas
