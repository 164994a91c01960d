"""The verdict on a router: one planted case for every word, and gates that a real router was made to give."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import tiny_model, token_data

import moe_lora_jax as mlj
from moe_lora_jax.measure.router_statistics import RouterStatistics, router_statistics
from moe_lora_jax.measure.verdict import verdict

ROUTERS = [f"model.layers.{n}.mlp.down_proj" for n in range(6)]


def planted(shares, routers=(5,), entropy=0.5) -> RouterStatistics:
    """Six routers of four experts: these shares at some of them, at the others a little uneven ones."""
    rows = {m: np.asarray(shares if n in routers else [0.3, 0.2, 0.27, 0.23]) for n, m in enumerate(ROUTERS)}
    return RouterStatistics(("all",), rows, dict.fromkeys(ROUTERS, entropy), {m: r[None] for m, r in rows.items()}, 9)


def config(**fields) -> mlj.MoeLoraConfig:
    return mlj.MoeLoraConfig(r=2, num_experts=4, target_modules=["down_proj"], **fields)


def test_collapsed_onto_one_expert():
    found = verdict(planted([0.01, 0.01, 0.01, 0.97]), config(), learning_rate=0.02)
    assert str(found) == (
        "collapsed: expert 3 of model.layers.5.mlp.down_proj gets 97 % of the gate weight; 1 of 6 routers is "
        "collapsed. To change it: set router_aux_loss_coef (found 0; 0.01 is a start), or lower the learning rate "
        "(found 0.02)"
    )


def test_collapsed_onto_as_many_experts_as_each_token_must_use():
    found = verdict(planted([0.4, 0.6, 0.0, 0.0], (1, 2)), config(top_k=2, router_aux_loss_coef=0.01))
    assert found.word == "collapsed"
    assert found.finding == (
        "expert 1 of model.layers.1.mlp.down_proj gets 60 % of the gate weight, 2 of its 4 experts get next to "
        "nothing; 2 of 6 routers are collapsed"
    )
    assert found.change == "raise router_aux_loss_coef (found 0.01), or lower the learning rate"


def test_a_router_that_keeps_one_expert_is_told_why_it_cannot_learn():
    stuck = verdict(planted([0.0, 0.0, 0.0, 1.0]), config(top_k=1))
    assert "gets more than 99 % of" in stuck.finding and "3 of its 4 experts get next to nothing" in stuck.finding
    assert stuck.change.startswith("set top_k to 2 (found 1) or norm_topk_prob to false, because such a router has no")
    free = verdict(planted([0.0, 0.0, 0.0, 1.0]), config(top_k=1, norm_topk_prob=False))
    assert free.change.endswith("lower the learning rate, or set top_k to 2 (found 1)")


def test_nearly_collapsed():
    found = verdict(planted([0.02, 0.91, 0.04, 0.03]), config())
    assert found.word == "nearly collapsed" and "expert 1 of model.layers.5.mlp.down_proj gets 91 % of" in found.finding
    assert "router_aux_loss_coef" in found.change


def test_unused_experts():
    found = verdict(planted([0.0, 0.3, 0.3, 0.4], (0, 3)), config())
    assert str(found) == (
        "unused experts: 2 of 24 experts get less than 1 % of an even share, the most of them in "
        "model.layers.0.mlp.down_proj, where expert 0 gets less than 0.1 % of the gate weight. To change it: set "
        "router_aux_loss_coef (found 0; 0.01 is a start), or train with fewer experts (num_experts, found 4)"
    )


def test_undecided():
    even = planted([0.25] * 4, range(6), entropy=0.998)
    found = verdict(even, config(router_aux_loss_coef=0.5), learning_rate=1e-5)
    assert str(found) == (
        "undecided: in 6 of 6 routers, model.layers.0.mlp.down_proj for one, a token's gates are alike (entropy 0.998 "
        "of 1), so the experts act as one LoRA. To change it: set top_k below the number of experts (found null, all "
        "experts), raise the learning rate (found 1e-05), lower router_aux_loss_coef (found 0.5), or train for longer"
    )
    assert verdict(planted([0.25] * 4, range(6), entropy=0.98), config()).word == "healthy"


def test_healthy():
    found = verdict(planted([0.1, 0.5, 0.2, 0.2]), config(top_k=2))
    assert str(found) == (
        "healthy: every expert is used; the largest share of one is 50 %, expert 1 of model.layers.5.mlp.down_proj, "
        "where even use is 25 %"
    )
    assert found.change == ""


def test_without_statistics_there_is_no_verdict():
    assert str(verdict("This adapter has no router.", config())) == "no verdict: this adapter has no router"


@pytest.mark.parametrize(("bias", "word"), [(20.0, "collapsed"), (0.0, "undecided")])
def test_of_gates_that_a_router_was_made_to_give(bias, word):
    """Routers without weights: their logits are the bias alone."""
    model = tiny_model(router_bias=True, top_k=None)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        block, name = module.split(".")
        router = getattr(getattr(model.model.layers[0], block), name).router
        router.kernel[...] = jnp.zeros_like(router.kernel[...])
        router.bias[...] = jnp.array([0.0, bias, 0.0])
    found = verdict(router_statistics(model, token_data(3)), model.moe_lora_config)
    assert found.word == word
    assert ("expert 1 of" in found.finding) == (word == "collapsed")
