"""Token ids without a row in the model: one error wherever they enter; padding may have any id."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_training import LLAMA, tiny_base, tiny_model, token_data

from moe_lora_jax.measure.router_statistics import router_statistics
from moe_lora_jax.models import generate
from moe_lora_jax.models.quantized import quantize_base
from moe_lora_jax.train import DataError, TrainSettings, evaluate, train
from moe_lora_jax.train.data import Example

SIZE = LLAMA["vocab_size"]
GOOD = np.array([[1, 5, 9, SIZE - 1], [3, 2, 1, 0]])


def quantized():
    return quantize_base(tiny_base(), "int8", block_size=16)


@pytest.mark.parametrize("make", [tiny_base, tiny_model, quantized])
@pytest.mark.parametrize("wrong", [SIZE, SIZE + 1000, -1])
def test_the_models_own_call_and_generation_name_the_place_and_the_id(make, wrong):
    model, ids = make(), GOOD.copy()
    ids[1, 2] = wrong
    expected = rf"input_ids\[1, 2\]: token id {wrong}, the model's vocabulary has {SIZE}: "
    for call in (
        lambda: model(ids),
        lambda: model(jnp.asarray(ids), jnp.ones_like(ids)),
        lambda: model.hidden_states(ids),
        lambda: generate(model, ids, max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=expected):
            call()


@pytest.mark.parametrize("make", [tiny_base, quantized])
@pytest.mark.parametrize("pad", [SIZE, -1, -100])
def test_padding_may_have_any_id(make, pad):
    model, ids, mask = make(), GOOD.copy(), np.ones_like(GOOD)
    mask[0, :2] = mask[1, 3:] = 0
    ids[mask == 0] = 0
    expected, tokens = model(ids, mask), generate(model, ids, mask, max_new_tokens=3)
    ids[mask == 0] = pad
    np.testing.assert_array_equal(model(ids, mask)[mask == 1], expected[mask == 1])
    graphdef, state = nnx.split(model)
    jitted = jax.jit(lambda state, ids, mask: nnx.merge(graphdef, state)(ids, mask))(state, ids, mask)
    assert np.isfinite(jitted).all()
    np.testing.assert_array_equal(generate(model, ids, mask, max_new_tokens=3)[:, 4:], tokens[:, 4:])


def test_data_that_were_read_without_a_model_name_the_line(tmp_path):
    data = token_data(4)
    bad = data.examples[2]
    ids = bad.ids.copy()
    ids[1] = SIZE + 3
    examples = (*data.examples[:2], Example(ids, bad.counted, bad.line), data.examples[3])
    data, good, model = type(data)(data.file, examples), token_data(4), tiny_model()
    for call in (
        lambda: evaluate(model, data),
        lambda: router_statistics(model, data),
        lambda: train(model, data, tmp_path / "out", TrainSettings(steps=1)),
        lambda: train(model, good, tmp_path / "out", TrainSettings(steps=1), eval_data=data),
    ):
        with pytest.raises(DataError) as caught:
            call()
        (problem,) = caught.value.problems
        assert problem.startswith(
            f"made_up.jsonl:3: token id {SIZE + 3}, the model's vocabulary has {SIZE}: the tokenizer"
        )
    assert not (tmp_path / "out").exists()
