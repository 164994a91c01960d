"""Renormalised top-1: warned of once, in the same words, where it is applied for training, and nowhere else."""

import warnings

import numpy as np
import pytest
from flax import nnx
from tiny_training import MODULES, TARGETS, tiny_base

import moe_lora_jax as mlj
from moe_lora_interop.config.stuck_routers import stuck_routers, warn_of_stuck_routers

STUCK = {"top_k": 1, "num_experts": 4, "r": 2, "target_modules": TARGETS}


@pytest.mark.parametrize(
    ("fields", "stuck"),
    [
        ({"top_k": 1}, ["a", "b"]),
        ({"top_k": 1, "norm_topk_prob": False}, []),
        ({"top_k": 2}, []),
        ({}, []),
        ({"top_k": 1, "top_p": 0.9}, []),
        ({"num_experts": 1}, []),
        ({"top_k": 2, "top_k_pattern": {"b": 1}}, ["b"]),
        ({"top_k": 1, "num_experts_pattern": {"a": 1}}, ["b"]),
    ],
)
def test_which(fields, stuck):
    config = mlj.MoeLoraConfig(**{"num_experts": 4, "target_modules": ["a", "b"], **fields})
    assert stuck_routers(config, ["a", "b"]) == stuck


def words_of(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "cannot learn" in str(w.message)]


def test_both_frameworks_say_it_in_the_same_words(tmp_path):
    pytest.importorskip("peft")
    import peft
    from torch import nn

    import moe_lora_interop.peft_tuner

    base = tiny_base()
    (in_jax,) = words_of(lambda: mlj.apply_moe_lora(base, mlj.MoeLoraConfig(**STUCK), rngs=nnx.Rngs(0)))
    assert in_jax.startswith(f"{MODULES} routers (") and "use top_k=2 or norm_topk_prob=False" in in_jax

    torch_base = nn.ModuleDict({name: nn.Linear(4, 4) for name in TARGETS})
    config = moe_lora_interop.peft_tuner.MoeLoraConfig(**STUCK)
    (in_torch,) = words_of(lambda: peft.get_peft_model(torch_base, config))
    assert in_torch.partition(", ...")[2] == in_jax.partition(", ...")[2]
    fresh = nn.ModuleDict({name: nn.Linear(4, 4) for name in TARGETS})
    for_inference = moe_lora_interop.peft_tuner.MoeLoraConfig(**STUCK, inference_mode=True)
    assert words_of(lambda: peft.get_peft_model(fresh, for_inference)) == []

    mlj.save_pretrained(base, tmp_path)
    assert words_of(lambda: mlj.load_adapter(tiny_base(), tmp_path)) == [], "to load is not yet to train"


def test_python_shows_it_once():
    config = mlj.MoeLoraConfig(**STUCK)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warn_of_stuck_routers(config, TARGETS)
    assert len(caught) == 1


def test_its_gradient_is_zero_and_that_of_top_2_is_not():
    def gradient(**fields):
        layer = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
        config = mlj.MoeLoraConfig(**{**STUCK, "target_modules": ["proj"], "init_lora_weights": False, **fields})
        model = nnx.Dict(proj=layer)
        mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(1))
        x = np.random.default_rng(0).standard_normal((30, 6)).astype(np.float32)
        found = nnx.grad(lambda m: (m.proj(x) ** 2).sum(), argnums=nnx.DiffState(0, mlj.MoeLoraParam))(model)
        return np.abs(np.asarray(found["proj"]["router"]["kernel"][...])).max()

    with pytest.warns(UserWarning, match="cannot learn"):
        assert gradient() == 0
    assert gradient(top_k=2) > 0.01 and gradient(norm_topk_prob=False) > 0.01
