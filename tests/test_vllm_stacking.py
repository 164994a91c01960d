"""A mixture read from a directory and stacked as one LoRA, against the tuner's layer."""

import numpy as np
import pytest
import torch
from torch import nn

import moe_lora_interop.peft_tuner as tuner
from moe_lora_interop import Adapter, MoeLoraConfig, read, write
from moe_lora_interop.checkpoint.servable import lora_rank
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.peft_tuner.layer import Linear
from moe_lora_interop.peft_tuner.model import MoeLoraModel
from moe_lora_interop.vllm_plugin.stacking import rows_of, stacked
from moe_lora_interop.vllm_plugin.tables import Tables, gated, units_of

IN, OUT, RANK = 24, 10, 64
CASES = {
    "dense": dict(num_experts=4),
    "top_k": dict(num_experts=8, top_k=2, routed_scaling_factor=1.5),
    "unequal": dict(num_experts=3, r=[1, 4, 2], lora_alpha=[3.0, 1.0, 8.0], top_k=2),
    "rslora": dict(num_experts=3, r=[2, 4, 3], use_rslora=True, router_temperature=0.7),
    "hydra": dict(num_experts=4, shared_lora_A=True),
    "threshold": dict(num_experts=5, threshold=0.2, norm_topk_prob=False),
    "adaptive": dict(num_experts=4, threshold=0.6, adaptive_threshold=True, router_bias=True),
    "sigmoid": dict(num_experts=4, scoring_func="sigmoid", router_bias=True, top_k=2),
    "arrow": dict(num_experts=6, scoring_func="abs_softmax", top_k=3),
    "identity": dict(num_experts=3, scoring_func="identity", norm_topk_prob=False),
    "sparsemax": dict(num_experts=6, scoring_func="sparsemax"),
    "dynmole": dict(num_experts=6, top_k=1, top_p=0.8, entropy_threshold=0.9),
    "plain": dict(num_experts=1),
    "plain_of_ffn": dict(num_experts=1, scope="ffn"),
}


def layer_and_adapter(seed=0, **fields) -> tuple[Linear, Adapter]:
    """A random layer of the tuner, and its adapter as the library holds one."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(IN, OUT))
    fields = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, "target_modules": ["fc"]} | fields
    MoeLoraModel(model, tuner.MoeLoraConfig(**fields), "default")
    layer = model.fc.eval()
    tensors = {}
    names = {"moe_lora_router": "router", "moe_lora_threshold": "threshold"}
    for name, parameter in layer.named_parameters():
        container, *_, kind = name.split(".")
        if container in names:
            nn.init.normal_(parameter)
            role = names[container] + ("_bias" if kind == "bias" else "")
            value = parameter[0] if container == "moe_lora_threshold" else parameter
        elif container in ("moe_lora_A", "moe_lora_B"):
            role, value = container.removeprefix("moe_"), parameter
        else:
            continue
        tensors["fc", role] = value.detach().numpy()
    return layer, Adapter(MoeLoraConfig(**fields), tensors)


def delta(adapter, x, rank=RANK, dtype=torch.float32, slot=1):
    """What vLLM computes beside the base: x in `dtype`, A x and the gates in fp32."""
    ((_, module),) = stacked(adapter, rank, dtype)
    tables = Tables(1, 3, rank, rows_of(dtype))
    tables.fill(slot, [module.gating])
    codes = x.to(dtype).float() @ module.a.float().T
    slots = torch.full((len(x),), slot)
    return (gated(codes[None], slots, tables, None)[0].to(dtype) @ module.b.T).float()


@pytest.mark.parametrize("name", CASES)
def test_the_delta_is_that_of_the_tuner(tmp_path, name):
    layer, adapter = layer_and_adapter(**CASES[name])
    write(adapter, tmp_path)
    x = torch.randn(50, IN)
    expected = (layer(x) - layer.base_layer(x)).detach()
    rank = lora_rank(adapter.config, adapter.modules, 1)
    for columns in {rank, RANK}:  # as few as vLLM allows, and more
        found = delta(read(tmp_path), x, columns)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dense", "adaptive"])
def test_half_precision_does_not_round_the_router(name, dtype):
    """The logits, against float64: A's last columns hold the router in parts."""
    _, adapter = layer_and_adapter(**CASES[name])
    ((_, module),) = stacked(adapter, RANK, dtype)
    x = torch.randn(50, IN).to(dtype)
    units = adapter.config.num_experts + adapter.config.adaptive_threshold
    codes = (x.double() @ module.a.double().T)[:, RANK - 3 * units :].unflatten(-1, (units, 3)).sum(-1).flip(-1)
    router = adapter.tensors["fc", "router"].astype(np.float64)
    if adapter.config.adaptive_threshold:
        router = np.concatenate([router, adapter.tensors["fc", "threshold"][None].astype(np.float64)])
    exact = x.double() @ torch.from_numpy(router).T
    assert (codes - exact).abs().max() < 1e-6
    rounded = x.double() @ torch.from_numpy(router).to(dtype).double().T  # one part: what this is for
    assert (rounded - exact).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["top_k", "adaptive", "hydra"])
def test_bfloat16_as_near_as_its_own_rounding(name):
    layer, adapter = layer_and_adapter(**CASES[name])
    x = torch.randn(50, IN).bfloat16().float()
    expected = (layer(x) - layer.base_layer(x)).detach()
    found = delta(adapter, x, dtype=torch.bfloat16)
    assert (found - expected).abs().max() < 2e-2 * expected.abs().max()


def test_every_expert_finds_its_columns_and_the_router_its_own():
    _, adapter = layer_and_adapter(**CASES["unequal"])
    ((module, found),) = stacked(adapter, 16, torch.float32)
    a, b = (adapter.tensors["fc", role] for role in ("lora_A", "lora_B"))
    assert module == "fc"
    np.testing.assert_array_equal(found.a[1:5], a[1, :4])
    np.testing.assert_allclose(found.b[:, 5:7], 8 / 2 * b[2][:, :2], rtol=1e-6)
    assert not found.a[7:13].any() and not found.b[:, 7:].any()
    np.testing.assert_array_equal(found.a[13:].flip(0), adapter.tensors["fc", "router"])


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 32), (torch.bfloat16, 64)])
def test_a_rank_that_is_too_small_is_refused_with_the_one_to_give(dtype, least):
    _, adapter = layer_and_adapter(num_experts=8, r=2)
    with pytest.raises(CheckpointError, match=f"--max-lora-rank: found 16, expected {least}: .* rows of all experts"):
        list(stacked(adapter, 16, dtype))
    assert list(stacked(adapter, least, dtype))


def test_what_vllm_cannot_serve_is_refused_by_name():
    _, adapter = layer_and_adapter(num_experts=1, modules_to_save=["norm"])
    with pytest.raises(CheckpointError, match="modules_to_save: found .*, expected null; instead, PEFT runs it"):
        list(stacked(adapter, 64, torch.float32))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128, 256, 320, 512])
def test_every_mixture_that_fits_the_rank_fits_the_tables(rank, parts):
    """The most experts that the rank has room for, of rank 1 each."""
    for threshold in (0, 1):
        experts = (rank - parts * threshold) // (1 + parts)
        assert min(experts + threshold, 32) <= units_of(rank, parts)
