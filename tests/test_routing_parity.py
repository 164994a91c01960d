"""`check_routing`: our own scores and selections pass it, and each way to break the contract is named."""

import sys
from dataclasses import dataclass, make_dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from moe_lora_interop import ConfigError, MoeLoraConfig, register_routing
from moe_lora_interop.config import routings as registry
from moe_lora_interop.export.task_gates import compute_gates
from moe_lora_interop.peft_tuner.gating import route as torch_route
from moe_lora_interop.testing import check_routing
from moe_lora_jax.layers.gating import Gating, route
from tests.numpy_mixture import decide
from tests.routings import Again, SignedRoot


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@dataclass(frozen=True)
class OurOwn:
    """What the config's fields say, as a routing. 0: null."""

    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    threshold: float = 0.0
    fewest: int = 0
    top_p: float = 0.0
    are_scores_signed: bool = False

    def config(self, z, top_k):
        fields = dict(threshold=self.threshold or None, top_p=self.top_p or None, top_k=self.fewest or top_k)
        experts = z.shape[-1]
        fields["top_k"] = None if fields["top_k"] is None or experts == 1 else fields["top_k"]
        if fields["top_k"] is None:
            fields["top_p"] = None  # of one expert
        norm = self.norm_topk_prob or (fields["top_k"] is fields["threshold"] is None and "s" in self.scoring_func)
        norm = norm and self.scoring_func != "identity"
        return MoeLoraConfig(num_experts=experts, scoring_func=self.scoring_func, norm_topk_prob=norm, **fields)

    def jax(self, z, top_k):
        config = self.config(z, top_k)
        found = route(z, Gating.of(config, config.for_module("x")), config.threshold)
        return found.scores if self.are_scores_signed else jnp.abs(found.scores), found.gates

    def torch(self, z, top_k):
        config = self.config(z, top_k)
        found = torch_route(z, config, config.top_k, config.threshold)
        return found.scores if self.are_scores_signed else found.scores.where(
            found.scores >= 0, -found.scores
        ), found.gates

    def numpy(self, z, top_k):
        config = self.config(z, top_k)
        scores = np.stack([decide(row, config, config.top_k, config.threshold)[0] for row in z])
        return scores if self.are_scores_signed else abs(scores), compute_gates(z, config, config.top_k)


SCORES = ["softmax", "abs_softmax", "sigmoid", "identity", "sparsemax"]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_our_own_scores_pass_with_any_top_k(score, norm):
    assert check_routing(OurOwn(score, norm)) == ("jax", "torch", "numpy")


@pytest.mark.parametrize(
    "rule",
    [OurOwn(score, threshold=0.22) for score in SCORES if score != "identity"]
    + [OurOwn(score, fewest=1, top_p=0.7) for score in ("softmax", "abs_softmax")],
)
def test_our_own_selections_that_take_no_top_k_pass(rule):
    register_routing("our_own", takes_top_k=False)(OurOwn)
    try:
        assert check_routing(rule) == ("jax", "torch", "numpy")
    finally:
        del OurOwn._moe_lora_routing


def test_signed_scores_are_refused_as_the_config_refuses_them_for_a_balancing_loss():
    found = broken(OurOwn("identity", are_scores_signed=True))
    assert {p.split(" at ")[0].split(": found")[0] for p in found} == {"jax: scores", "torch: scores", "numpy: scores"}
    assert all("expected >= 0" in problem for problem in found)


@pytest.mark.parametrize("routing", ["again", Again, Again(), "signed_root", SignedRoot(power=3.0, spread=False)])
def test_a_name_a_class_or_an_object(routing):
    assert check_routing(routing) == ("jax", "torch", "numpy")
    assert check_routing(routing, frameworks=["numpy", "torch"]) == ("torch", "numpy")


def broken(rule, **options):
    with pytest.raises(ConfigError) as error:
        check_routing(rule, **options)
    return error.value.problems


def changed(**functions):
    """`Again` with other functions."""
    kind = make_dataclass("Changed", [], bases=(Again,), frozen=True)
    for name, function in functions.items():
        setattr(kind, name, function)
    return kind()


def torch_ties(self, z, top_k):
    kept = z.argsort(dim=-1, stable=True, descending=False).flip(-1).argsort(dim=-1) < (top_k or z.shape[-1])
    return z.softmax(-1), z.masked_fill(~kept, -torch.inf).softmax(-1)


def jax_across(self, z, top_k):
    scores, gates = Again.jax(self, z, top_k)
    return scores, gates * jnp.mean(scores, axis=0) * z.shape[-1]


def jax_without_slope(self, z, top_k):
    scores, gates = Again.jax(self, z, top_k)
    return scores, jax.lax.stop_gradient(gates)


def torch_nan_slope(self, z, top_k):
    scores, gates = Again.torch(self, z, top_k)
    return scores + 0 * (z - z.amax(-1, keepdim=True)).abs().sqrt(), gates


def numpy_keeps_all(self, z, top_k):
    return Again.numpy(self, z, None)


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (changed(jax=lambda self, z, k: tuple(1.001 * a for a in Again.jax(self, z, k))), "gates: jax against torch:"),
        (changed(torch=lambda self, z, k: (z.sigmoid(), Again.torch(self, z, k)[1])), "scores: torch against numpy:"),
        (changed(torch=torch_ties), "gates: torch against numpy: found"),
        (changed(torch=torch_ties), "(ties, top_k 1)"),
        (changed(jax=jax_across), "jax: gates of a token depend on other tokens: found"),
        (changed(jax=jax_without_slope), "gates, slope: jax against numpy: found 0 and"),
        (changed(torch=torch_nan_slope), "torch: scores, slope: found nan at token"),
        (changed(numpy=numpy_keeps_all), "numpy: gates: found 5 that are not 0 at one token, expected at most 1"),
        (
            changed(jax=lambda self, z, k: (z, z[:, :0])),
            "Changed.jax: gates: found float32 [24, 0], expected float32",
        ),
        (
            changed(numpy=lambda self, z, k: (z, z.astype("f4"))),
            "Changed.numpy: gates: found float32 [24, 5], expect",
        ),
        (changed(numpy=lambda self, z, k: tuple(a / 0.0 for a in (abs(z), z))), "numpy: scores: found inf at token"),
        (
            changed(numpy=lambda self, z, k: (abs(z), np.sign(np.sin(1e9 * z)))),
            "numpy: gates, slope: found kinks or jumps at",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_each_breach_is_named(rule, wanted):
    assert any(wanted in problem for problem in broken(rule)), broken(rule)


def test_a_small_difference_is_one_only_at_a_finer_tolerance():
    rule = changed(jax=lambda self, z, k: tuple(a * (1 + 2e-5) for a in Again.jax(self, z, k)))
    assert check_routing(rule, tolerance=1e-4) and broken(rule)


def test_one_function_is_nothing_to_compare():
    assert broken(Again, frameworks=["jax"]) == ("functions: found jax, expected two of jax, torch, numpy to compare",)
    with pytest.raises(ConfigError, match="'nobodys' is not registered"):
        check_routing("nobodys")


def test_without_a_framework_the_others_are_compared(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    assert check_routing("again", frameworks=["torch", "numpy"]) == ("torch", "numpy")
    with pytest.raises(ImportError, match="jax"):
        check_routing("again")


def test_of_a_rule_without_top_k_only_that_is_asked():
    seen = set()

    def numpy(self, z, top_k):
        seen.add(top_k)
        return Again.numpy(self, z, None)

    kind = type(changed(numpy=numpy))
    register_routing("changed", takes_top_k=False)(kind)
    check_routing("changed", frameworks=["torch", "numpy"])
    assert seen == {None} and replace(kind()) == kind()
