"""Generation with routers beside the layers: greedy as in JAX, by task, with beams, with and without a cache."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_peft_support import (
    IDS,
    THIRD_PARTY_WARNINGS,
    input_ids,
    tiny_llama,
    wrapped,
)

import moe_lora_jax as mlj

pytestmark = THIRD_PARTY_WARNINGS


@pytest.mark.parametrize("name", ["ffn", "model", "layerwise"])
def test_generate_equals_jax(tmp_path, name):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = wrapped(name, base)
    model.save_pretrained(tmp_path / "adapter")
    kwargs = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(input_ids=input_ids(), use_cache=False, **kwargs)
    jax_model = mlj.load_adapter(mlj.load_base_model(tmp_path / "base"), tmp_path / "adapter")
    likeliest = jax_model(jnp.asarray(found[:, :-1])).argmax(-1)
    np.testing.assert_array_equal(found[:, 7:], likeliest[:, 6:])
    if name == "ffn":
        assert torch.equal(model.generate(input_ids=input_ids(), **kwargs), found)


def test_two_passes_refuse_a_cache_which_would_hold_only_one():
    model = wrapped("model")
    with pytest.raises(ValueError, match=r"'default' has a router of the whole model.*pass use_cache=False"):
        model.generate(input_ids=input_ids(), max_new_tokens=2, pad_token_id=0)
    with torch.no_grad():
        first = model(input_ids(), use_cache=True)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(input_ids(), past_key_values=first.past_key_values)


@pytest.mark.parametrize("name", ["poly", "embedding"])
def test_generate_by_task_with_and_without_cache(name):
    model = wrapped(name)
    kwargs = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with model.base_model.task_routing(IDS):
        cached, found = (model.generate(input_ids=input_ids(), use_cache=c, **kwargs) for c in (True, False))
    assert torch.equal(cached, found)
    assert not torch.equal(tiny_llama().generate(input_ids=input_ids(), **kwargs), found)


@pytest.mark.parametrize("name", ["poly", "embedding"])
def test_beams_take_the_task_of_their_sample(name):
    model = wrapped(name)
    kwargs = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with model.base_model.task_routing(IDS):
        both = model.generate(input_ids=input_ids(), **kwargs)
    for i, task in enumerate(IDS):
        with model.base_model.task_routing([task]):
            assert torch.equal(model.generate(input_ids=input_ids()[[i]], **kwargs), both[[i]])
