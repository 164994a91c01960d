"""Task ids: how they reach the model, and what is said of ids that are missing or wrong."""

import numpy as np
import peft
import pytest
import torch
from test_peft_support import (
    FIELDS,
    THIRD_PARTY_WARNINGS,
    config,
    input_ids,
    logits,
    out,
    tiny_llama,
    wrapped,
)

import moe_lora_interop.peft_tuner as tuner

pytestmark = THIRD_PARTY_WARNINGS
by_task = pytest.mark.parametrize("name", ["poly", "table", "embedding"])


def routed(model, ids):
    with model.base_model.task_routing(ids):
        return logits(model)


@by_task
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32)])
def test_ids_of_any_integer_kind(name, kind):
    model = wrapped(name)
    assert torch.equal(routed(model, kind([3, 1])), out(model, name))


@by_task
def test_each_sample_has_its_own_task(name):
    model = wrapped(name)
    both = routed(model, [3, 0])
    for i, task in enumerate([3, 0]):
        torch.testing.assert_close(both[i], routed(model, [task])[i], msg="one id serves the whole batch")
    assert not torch.allclose(both[1], routed(model, [3, 1])[1])


@by_task
def test_several_ids_are_averaged_without_zeros(name):
    model = wrapped(name)
    one = routed(model, [2, 2])
    torch.testing.assert_close(routed(model, [[2], [2]]), one)
    torch.testing.assert_close(routed(model, [[0, 2, 0], [2, 2, 0]]), one)
    tables = [
        m.moe_lora_task_embedding["default"]
        for m in model.modules()
        if hasattr(m, "moe_lora_task_embedding") and m.moe_lora_task_embedding
    ]
    several = routed(model, [[1, 3], [1, 3]])
    none = routed(model, [[0, 0], [0, 0]])
    for table in tables:
        table.weight.data[2] = table.weight.data[[1, 3]].mean(0)
    torch.testing.assert_close(routed(model, [2, 2]), several)
    for table in tables:
        table.weight.data[2] = 0
    torch.testing.assert_close(routed(model, [2, 2]), none)


@by_task
def test_contexts_nest_and_end(name):
    model = wrapped(name)
    with model.base_model.task_routing([3, 1]):
        with pytest.raises(KeyError), model.base_model.task_routing([0, 0]):
            assert torch.equal(logits(model), routed(model, [0, 0]))
            raise KeyError
        assert torch.equal(logits(model), out(model, name))
    with pytest.raises(ValueError, match=r"adapter 'default' routes by task: run the model inside `with peft_model"):
        logits(model)


@by_task
def test_an_argument_task_ids_is_not_silently_dropped(name):
    with pytest.raises(ValueError, match="PEFT drops a task_ids argument"):
        logits(wrapped(name), task_ids=torch.tensor([3, 1]))


@by_task
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 4], "task_ids: found 4, expected ids from 0 to 3"),
        ([[0, -1], [7, 1]], "task_ids: found -1, 7, expected ids from 0 to 3"),
        ([0, 1, 2], "task_ids: found 3 for a batch of 2, expected one for each sample"),
        ([1] * 14, "task_ids: found 14 for a batch of 2"),
        ([0.0, 1.0], r"task_ids: found float32 \[2\], expected integers \[batch\] or \[batch, n\]"),
        ([True, False], r"found bool \[2\]"),
        (1, r"found int64 \[\]"),
        ([[[1]]], r"found int64 \[1, 1, 1\]"),
    ],
)
def test_wrong_ids(name, ids, message):
    with pytest.raises(ValueError, match=message):
        routed(wrapped(name), ids)


def test_no_adapter_by_task():
    model = peft.get_peft_model(tiny_llama(), config())
    with pytest.raises(ValueError, match="no MOE_LORA adapter of this model routes by task"):
        routed(model, [0, 1])
    with pytest.raises(ValueError, match="no MOE_LORA adapter"), tuner.task_routing(wrapped("model"), [0, 1]):
        pass


def test_another_adapter_needs_no_ids():
    model = wrapped("poly")
    model.add_adapter("hidden", config(target_modules="all-linear"))
    model.set_adapter("hidden")
    logits(model)
    model.base_model.set_adapter(["hidden", "default"])
    assert not torch.equal(routed(model, [3, 1]), routed(model, [0, 1]))


def test_embeddings_as_input():
    model = wrapped("embedding")
    embedded = model.get_input_embeddings()(input_ids())
    with torch.no_grad(), model.base_model.task_routing([3, 1]):
        assert torch.equal(model(inputs_embeds=embedded).logits, out(model, "embedding"))
    hidden = wrapped("layerwise")
    with torch.no_grad():
        assert torch.equal(hidden(inputs_embeds=embedded).logits, out(hidden, "layerwise"))


def test_the_poly_rule_is_deterministic_in_training():
    """PEFT's Poly draws its gates from a relaxed Bernoulli in training; ours are the sigmoids."""
    model = wrapped("poly").train()
    with model.base_model.task_routing([3, 1]):
        twice = [model(input_ids()).logits for _ in range(2)]
    assert torch.equal(*twice)
    assert FIELDS["poly"]["scoring_func"] == "sigmoid"
