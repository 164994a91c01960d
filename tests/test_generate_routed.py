"""Generation with adapters whose gates travel: greedy tokens are those of whole forward passes without a cache."""

import jax.numpy as jnp
import numpy as np
import pytest

import moe_lora_jax as mlj
from tests.peers_data import Peer

PEERS = ["moe_peft/mixlora", "xlora/depth2_topk", "xlora/depth1_layerwise", "moelora/adapter", "poly/mhr_splits2"]


@pytest.mark.parametrize("name", [*PEERS, "adamole/adamole"])
def test_greedy_tokens_are_the_argmax_of_full_passes(name):
    peer = Peer(name)
    model = mlj.load_adapter(mlj.load_base_model(peer.base), peer.directory, **peer.options)
    reference = peer.reference
    routing = {"task_ids": jnp.asarray(reference["task_ids"])} if "task_ids" in reference else {}
    ids = np.asarray(reference["input_ids"])[:, :5]
    found = np.asarray(mlj.generate(model, ids, max_new_tokens=4, eos_token_id=(), **routing))
    for length in range(5, 9):
        logits = np.asarray(model(jnp.asarray(found[:, :length]), **routing))[:, -1]
        np.testing.assert_array_equal(found[:, length], logits.argmax(-1))


def test_task_routing_without_ids_is_an_error():
    peer = Peer("moelora/adapter")
    model = mlj.load_adapter(mlj.load_base_model(peer.base), peer.directory)
    with pytest.raises(ValueError, match="routes by task: call the model with task_ids="):
        mlj.generate(model, np.ones((1, 3), int), max_new_tokens=2)
