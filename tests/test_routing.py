"""Routings of somebody else: registered, saved by name, found in a fresh process, refused where they are not known."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from test_peft_support import THIRD_PARTY_WARNINGS

import moe_lora_interop
import moe_lora_interop.peft_tuner as tuner
import moe_lora_jax as mlj
from moe_lora_interop import ConfigError, MoeLoraConfig, register_routing
from moe_lora_interop.checkpoint.servable import vllm_needs
from moe_lora_interop.config import routings as registry
from moe_lora_interop.config.in_words import routing_in_words
from moe_lora_interop.config.stuck_routers import stuck_routers
from moe_lora_interop.export import export_mixtral
from moe_lora_interop.export.task_gates import compute_gates
from moe_lora_interop.peft_tuner.gating import route as torch_route
from moe_lora_jax.layers.gating import Gating, route
from moe_lora_jax.train.losses import load_balancing_loss
from tests.adapters import assert_same_tensors, make_adapter
from tests.hf import make_model, save_model
from tests.routings import Again, SignedRoot

pytestmark = THIRD_PARTY_WARNINGS
ROOT = Path(__file__).parent.parent
IDS = np.random.default_rng(0).integers(3, 90, (2, 6))
AGAIN = {"name": "again", "version": 1}
SIGNED = {"name": "signed_root", "version": 2, "power": 1.0, "spread": True, "weights": []}


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(make_model("llama", num_hidden_layers=2), tmp_path_factory.mktemp("base"))


def problems(function, *args, **kwargs):
    with pytest.raises(ConfigError) as error:
        function(*args, **kwargs)
    return list(error.value.problems)


# --- registering ----------------------------------------------------------------------------------------------------


def one(**fields):
    """A class that could be registered, with these fields."""
    made = make_dataclass("One", [(k, type(v), field(default=v)) for k, v in fields.items()], frozen=True)
    made.numpy = lambda self, z, top_k: (z, z)
    return made


@dataclass
class Mutable:
    def jax(self, z, top_k): ...


@dataclass(frozen=True)
class Child(Again):
    pass


@pytest.mark.parametrize(
    ("arguments", "rule", "wanted"),
    [
        (("Mine",), one(), "name: found 'Mine', expected [a-z][a-z0-9_]*"),
        (("",), one(), "name: found ''"),
        (("mine", 0), one(), "version: found 0, expected an integer >= 1"),
        (("mine", True), one(), "version: found True"),
        (("mine",), Mutable, "found no frozen dataclass, expected @dataclass(frozen=True) below @register_routing"),
        (("mine",), object, "found no frozen dataclass"),
        (("mine",), type("Bare", (Again,), {}), "found no frozen dataclass"),
        (("mine",), make_dataclass("None_", [], frozen=True), "expected a method jax, torch or numpy"),
        (("mine",), one(name="x"), "name: found as a field, expected another name"),
        (("mine",), one(x=float("nan")), "x: found nan, expected a default that is a finite number"),
        (("mine",), one(x=((1,),)), "x: found ((1,),), expected a default"),
        (("mine",), make_dataclass("Without", [("x", int)], frozen=True), "x: found no default, expected a default"),
        (("mine",), Again, "found registered as 'again', version 1, expected a class of its own"),
        (("again",), one(), "name: 'again', version 1, is tests.routings.Again; expected another name or version"),
    ],
)
def test_what_cannot_be_registered(arguments, rule, wanted):
    name, *version = arguments
    found = problems(register_routing(name, **dict(zip(["version"], version, strict=False))), rule)
    assert any(problem.startswith(wanted) or wanted in problem for problem in found)


def test_a_class_may_be_defined_anew_and_has_one_version_beside_another():
    first, second = (register_routing("mine")(one(power=p)) for p in (1.0, 2.0))  # of one module and name
    assert MoeLoraConfig(routing=second()).routing == {"name": "mine", "version": 1, "power": 2.0}
    assert any("found One(power=1.0)" in p for p in problems(MoeLoraConfig, routing=first()))  # no longer known
    register_routing("mine", version=2)(one(factor=3))
    assert MoeLoraConfig(routing={"name": "mine", "version": 1}).routing["power"] == 2.0
    assert MoeLoraConfig(routing={"name": "mine", "version": 2}).routing["factor"] == 3
    assert registry.find_routing("mine").__dataclass_fields__.keys() == {"factor"}
    child = register_routing("child")(Child)
    assert MoeLoraConfig(routing=child()).routing == {"name": "child", "version": 1}


# --- the config -----------------------------------------------------------------------------------------------------


def test_a_config_says_the_rule_by_name_version_and_every_field():
    config = MoeLoraConfig(routing=SignedRoot(power=3.0, weights=(1, 2)))
    assert config.routing == {**SIGNED, "power": 3.0, "weights": [1, 2]}
    assert config.routing_rule == SignedRoot(power=3.0, weights=(1, 2))
    assert config.format_version == 2
    assert MoeLoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for again in (copy.deepcopy(config), replace(config)):
        assert again == config and hash(again) == hash(config) and again.routing_rule == config.routing_rule
    assert MoeLoraConfig(routing={"name": "signed_root", "version": 2}).routing == SIGNED
    assert MoeLoraConfig(routing=SignedRoot()) != MoeLoraConfig(routing=SignedRoot(power=2.0)) != MoeLoraConfig()


def test_without_one_nothing_is_said_and_the_version_stays():
    config = MoeLoraConfig()
    assert config.routing is None and config.routing_rule is None and config.format_version == 1
    assert "routing" not in config.to_dict()
    assert MoeLoraConfig.from_dict({"format_version": 1, "routing": None}) == config


def test_version_1_cannot_say_it():
    stored = {**MoeLoraConfig().to_dict(), "routing": AGAIN}
    assert problems(MoeLoraConfig.from_dict, stored) == [
        f"routing: found {AGAIN}, expected what format_version 1 can say"
    ]


@pytest.mark.parametrize(
    ("routing", "wanted"),
    [
        ({"name": "agian", "version": 1}, "routing: 'agian' is not registered, found again, signed_root; did you"),
        (
            {"name": "agian", "version": 1},
            "register_routing('agian'), or install a package with an entry point",
        ),
        ({**AGAIN, "version": 3}, "routing: found version 3 of 'again', registered: 1; upgrade tests.routings"),
        (
            {**SIGNED, "version": 1},
            "routing: found version 1 of 'signed_root', registered: 2; register the former",
        ),
        ({**SIGNED, "powr": 2.0}, "routing: powr: unknown field of 'signed_root'; did you mean power?"),
        ({**SIGNED, "power": "2"}, "routing: power: found '2', expected a finite number"),
        ({**SIGNED, "power": True}, "routing: power: found True, expected a finite number"),
        ({**SIGNED, "spread": 1}, "routing: spread: found 1, expected true or false"),
        ({**SIGNED, "weights": 1}, "routing: weights: found 1, expected a list"),
        ({**SIGNED, "power": -1}, "routing: power: found -1, expected > 0"),  # the class's own check
    ],
)
def test_a_routing_that_is_not_known_is_refused_by_name(routing, wanted):
    assert any(wanted in problem for problem in problems(MoeLoraConfig, routing=routing, target_modules=["q"]))


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (
            dict(scoring_func="sigmoid"),
            "routing: found together with scoring_func sigmoid, which it replaces",
        ),
        (
            dict(threshold=0.3, adaptive_threshold=True),
            "with threshold 0.3, adaptive_threshold True, which",
        ),
        (dict(top_k=1, top_p=0.5), "with top_p 0.5"),
        (
            dict(top_k=1, entropy_threshold=0.5, entropy_index=2.0, entropy_eps=0.1),
            "index 2.0, entropy_eps 0.1",
        ),
        (
            dict(top_k=1, norm_topk_prob=False),
            "norm_topk_prob False, which it replaces; expected norm",
        ),
    ],
)
def test_fields_that_it_replaces_are_refused_beside_it(fields, wanted):
    assert any(wanted in problem for problem in problems(MoeLoraConfig, routing=Again(), **fields))


def test_top_k_is_refused_beside_a_rule_without_use_for_it():
    rule = register_routing("dense", takes_top_k=False)(one())()
    assert MoeLoraConfig(routing=rule, top_k_pattern={"q": None}).top_k is None
    for fields in (dict(top_k=2), dict(top_k_pattern={"q": 2})):
        assert any("a routing that takes no top_k" in p for p in problems(MoeLoraConfig, routing=rule, **fields))


def test_what_is_derived_of_a_rule_does_not_speak_of_the_fields_that_it_replaces():
    config = MoeLoraConfig(routing=Again(), top_k=1)
    assert stuck_routers(config, ["a"]) == [] != stuck_routers(MoeLoraConfig(top_k=1), ["a"])
    assert not config.gates_sum_to_one and MoeLoraConfig(top_k=1).gates_sum_to_one


def test_in_words():
    config = MoeLoraConfig(routing=SignedRoot(power=2.0), top_k=2, routed_scaling_factor=1.5, router_temperature=2)
    words = "gates by signed_root (version 2, k=2, power=2, spread=True, weights=[]), times 1.5"
    assert routing_in_words(config) == f"z = (R x) / 2, {words}"
    assert routing_in_words(MoeLoraConfig(routing=Again())) == "z = R x, gates by again (version 1)"


# --- what is computed -----------------------------------------------------------------------------------------------


def of_jax(z, config, top_k=None):
    return route(jnp.asarray(z), Gating.of(config, config.for_module("x")))


def of_torch(z, config, top_k=None):
    return torch_route(torch.from_numpy(z), config, config.top_k, None)


@pytest.mark.parametrize("of", [of_jax, of_torch])
def test_the_decision_is_what_the_function_gives_for_each_row(of):
    config = MoeLoraConfig(num_experts=4, top_k=2, routing=SignedRoot(power=2.0))
    z = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    found = of(z, config)
    scores, gates = SignedRoot(power=2.0).numpy(z.astype(np.float64).reshape(6, 4), 2)
    np.testing.assert_array_equal(found.logits, z)
    np.testing.assert_allclose(np.asarray(found.scores).reshape(6, 4), scores, atol=1e-6)
    np.testing.assert_allclose(np.asarray(found.gates).reshape(6, 4), gates, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(found.kept).reshape(6, 4), gates != 0)
    np.testing.assert_allclose(compute_gates(z.astype(np.float64), config, 2).reshape(6, 4), gates)


@dataclass(frozen=True)
class All:
    """Keeps all, whatever top_k says, where the first logit is positive, else one."""

    def jax(self, z, top_k):
        return jax.nn.softmax(z), jnp.where((z[:, :1] > 0) | (jnp.arange(z.shape[1]) == 0), 0.5, 0.0)

    def torch(self, z, top_k):
        return z.softmax(-1), torch.where((z[:, :1] > 0) | (torch.arange(z.shape[1]) == 0), 0.5, 0.0)

    def numpy(self, z, top_k):
        return abs(z), np.where((z[:, :1] > 0) | (np.arange(z.shape[1]) == 0), 0.5, 0.0)


def test_a_token_that_keeps_more_than_top_k_gets_nan():
    config = MoeLoraConfig(num_experts=3, top_k=2, routing=register_routing("all")(All)())
    z = np.array([[1.0, 0, 0], [-1, 0, 0]], np.float32)
    for of in (of_jax, of_torch):
        np.testing.assert_array_equal(of(z, config).gates, [[np.nan] * 3, [0.5, 0, 0]])
    found = problems(compute_gates, z.astype(np.float64), config, 2)
    assert found == ["routing: keeps 3 experts of a token, expected at most top_k = 2"]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (lambda z: z, "expected two arrays, scores and gates"),
        (lambda z: (z, z[:, :2]), "gates: found float32 [5, 2], expected float32 [5, 3]"),
        (lambda z: (z > 0, z), "scores: found bool [5, 3], expected float32 [5, 3]"),
        (lambda z: (z, 1.0), "gates: found float, expected float32 [5, 3]"),
    ],
)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_another_shape_or_dtype_is_refused(framework, answer, wanted):
    kind = make_dataclass("Wrong", [], frozen=True)
    setattr(kind, framework, lambda self, z, top_k: answer(z))
    config = MoeLoraConfig(num_experts=3, routing=register_routing("wrong")(kind)())
    of = {"jax": of_jax, "torch": of_torch}[framework]
    assert problems(of, np.zeros((5, 3), np.float32), config)[0].startswith(f"Wrong.{framework}: ")
    assert any(wanted in problem for problem in problems(of, np.zeros((5, 3), np.float32), config))


def test_a_framework_without_its_function_is_refused_before_anything_is_computed(base):
    config = MoeLoraConfig(target_modules=["q_proj"], routing=register_routing("half")(one())())
    wanted = "routing: 'half' has no function for {0}, expected a method {0}(self, logits, top_k)"
    model = mlj.load_base_model(base)
    assert problems(mlj.apply_moe_lora, model, config, rngs=nnx.Rngs(0)) == [wanted.format("jax")]
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(base)
    fields = {"target_modules": ["q_proj"], "routing": config.routing}
    found = problems(peft.get_peft_model, torch_model, tuner.MoeLoraConfig(**fields))
    assert found == [wanted.format("torch")]
    only_jax = make_dataclass("OnlyJax", [], frozen=True)
    only_jax.jax = Again.jax
    config = replace(config, routing=register_routing("only_jax")(only_jax)())
    assert problems(compute_gates, np.zeros((2, 4)), config) == [wanted.format("numpy").replace("half", "only_jax")]


SCOPES = {
    "linear": dict(target_modules="all-linear", top_k=2),
    "top 1 by module": dict(target_modules="all-linear", top_k_pattern={"q_proj": 1, "up_proj": 3}),
    "codes": dict(target_modules=["q_proj", "up_proj"], top_k=2, router_input="expert_activations"),
    "weights": dict(target_modules="all-linear", top_k=2, mix="weights", n_splits=2),
    "tasks": dict(target_modules=["q_proj"], router_input="task", num_tasks=3, router_depth=0),
    "ffn": dict(target_modules=["gate_proj", "up_proj", "down_proj"], scope="ffn", top_k=2),
    "dense ffn": dict(target_modules=["gate_proj", "up_proj", "down_proj"], scope="ffn"),
    "model": dict(target_modules=["q_proj", "up_proj"], scope="model", layerwise=True, top_k=2),
    "temperature": dict(target_modules=["q_proj"], temperature_hidden_size=4, top_k=2),
}


def mixture(base, seed=0, **fields):
    """A random adapter with routers far from uniform."""
    model = mlj.load_base_model(base)
    config = MoeLoraConfig(**{"num_experts": 4, "r": 2, "lora_alpha": 1, "init_lora_weights": False, **fields})
    adapter = mlj.to_adapter(mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(seed)))
    rng = np.random.default_rng(seed)
    tensors = {
        slot: t if slot[1].startswith("lora") else 0.5 * rng.normal(size=t.shape).astype(t.dtype)
        for slot, t in adapter.tensors.items()
    }
    return moe_lora_interop.Adapter(adapter.config, tensors)


def in_jax(base, adapter, **switches):
    """Logits and the balancing loss."""
    model = mlj.load_adapter(mlj.load_base_model(base, **switches), adapter)
    tasks = {"task_ids": np.array([2, 1])} if adapter.config.router_input == "task" else {}
    logits, router = nnx.jit(lambda m: m(IDS, **tasks, return_router=True))(model)
    return np.asarray(logits), float(load_balancing_loss(router, adapter.config))


def in_torch(base, adapter, directory):
    moe_lora_interop.write(adapter, directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, directory, is_trainable=True)
    if adapter.config.router_input == "task":
        with tuner.task_routing(model, [2, 1]):
            logits = model(torch.tensor(IDS)).logits
    else:
        logits = model(torch.tensor(IDS)).logits
    return logits.detach().numpy(), tuner.moe_lora_aux_loss(model).item()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_a_rule_that_says_the_default_once_more_computes_the_same_in_every_scope(base, scope, tmp_path):
    ours = mixture(base, **SCOPES[scope], router_aux_loss_coef=1.0)
    theirs = moe_lora_interop.Adapter(replace(ours.config, routing=Again()), ours.tensors)
    expected, balance = in_jax(base, ours)
    largest = np.abs(expected).max()
    for found, found_balance in (in_jax(base, theirs), in_torch(base, theirs, tmp_path / "written")):
        np.testing.assert_allclose(found, expected, atol=1e-5 * largest)
        np.testing.assert_allclose(found_balance, balance, rtol=1e-5)
    without = in_jax(base, moe_lora_interop.Adapter(replace(ours.config, routing=SignedRoot()), ours.tensors))[0]
    assert np.abs(without - expected).max() > 1e-3 * largest  # the rule counts


def test_scanned_layers_and_a_bank_go_by_the_rule(base):
    one, other = (mixture(base, seed, **SCOPES["linear"], routing=SignedRoot()) for seed in (0, 1))
    expected, other_logits = in_jax(base, one)[0], in_jax(base, other)[0]
    np.testing.assert_allclose(in_jax(base, one, scan_layers=True)[0], expected, atol=1e-5)
    bank = mlj.AdapterBank(mlj.load_base_model(base), {"one": one, "other": other})
    bank.select(["one", "other"])
    found = bank.model(IDS)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(found[1], other_logits[1], atol=1e-5)


def test_gradients_go_through_the_rule_in_compiled_torch():
    config = MoeLoraConfig(num_experts=4, top_k=2, routing=SignedRoot())
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.arange(24.0).reshape(6, 4)
    compiled = torch.compile(
        lambda z: (torch_route(z, config, 2, None).gates * weights).sum(), backend="aot_eager", fullgraph=True
    )
    found = z.clone().requires_grad_()
    compiled(found).backward()
    expected = jax.grad(lambda z: jnp.sum(of_jax(z, config).gates * weights.numpy()))(jnp.asarray(z.numpy()))
    np.testing.assert_allclose(found.grad, expected, atol=1e-5)


def test_a_model_is_not_saved_under_a_rule_that_was_defined_anew(base):
    made = register_routing("mine")(make_dataclass("Mine", [], bases=(Again,), frozen=True))
    model = mlj.load_base_model(base)
    mlj.apply_moe_lora(model, MoeLoraConfig(target_modules=["q_proj"], routing=made()), rngs=nnx.Rngs(0))
    assert mlj.to_adapter(model).config.routing == {"name": "mine", "version": 1}
    register_routing("mine")(make_dataclass("Mine", [], bases=(SignedRoot,), frozen=True))
    model.moe_lora_config = replace(model.moe_lora_config)  # as a fresh process would read it
    with pytest.raises(moe_lora_interop.CheckpointError, match="gating: found .*, expected .* as in the config"):
        mlj.to_adapter(model)


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_file_says_it_and_both_frameworks_write_the_same_config(base, tmp_path):
    adapter = mixture(base, **SCOPES["linear"], routing=SignedRoot(power=3.0))
    moe_lora_interop.write(adapter, tmp_path / "jax")
    stored = json.loads((tmp_path / "jax/adapter_config.json").read_text())
    assert stored["routing"] == {**SIGNED, "power": 3.0} and stored["format_version"] == 2
    assert_same_tensors(moe_lora_interop.read(tmp_path / "jax").tensors, adapter.tensors)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.PeftModel.from_pretrained(model, tmp_path / "jax").save_pretrained(tmp_path / "torch")
    again = moe_lora_interop.read(tmp_path / "torch")
    assert again.config.routing == stored["routing"]
    assert_same_tensors(again.tensors, adapter.tensors)


@pytest.mark.parametrize("layout", ["mola", "loramoe", "mixlora", "xlora", "arrow"])
def test_layouts_of_others_cannot_say_it(layout, tmp_path):
    adapter = make_adapter(routing=Again(), top_k=2)
    with pytest.raises(ConfigError, match="routing"):
        moe_lora_interop.write(adapter, tmp_path, layout)


def test_mixtral_cannot_say_it(base, tmp_path):
    adapter = mixture(base, **SCOPES["ffn"], routing=Again())
    with pytest.raises(moe_lora_interop.CheckpointError, match="routing: .*'again'.*, expected null: Mixtral has"):
        export_mixtral(adapter, base, tmp_path / "out")


PACKAGE = """
from dataclasses import dataclass

from moe_lora_interop import register_routing


@register_routing("theirs")
@dataclass(frozen=True)
class Theirs:
    power: float = 1.0

    def jax(self, logits, top_k):
        import jax
        return jax.nn.softmax(logits), jax.nn.sigmoid(logits) * self.power

    def torch(self, logits, top_k):
        return logits.softmax(-1), logits.sigmoid() * self.power
"""
FRESH = """
import sys
import numpy as np
base, directory = sys.argv[1:]
from moe_lora_interop.cli.main import main
codes = [main(["verify", directory]), main(["inspect", directory])]
assert "their_package" in sys.modules or any(codes)
if any(codes):
    sys.exit(max(codes))
import moe_lora_interop.peft_tuner, moe_lora_jax as mlj, peft, torch, transformers
ids = np.arange(3, 9)[None]
theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), directory).eval()
ours = mlj.load_adapter(mlj.load_base_model(base), directory)
difference = np.abs(theirs(torch.tensor(ids)).logits.detach().numpy() - np.asarray(ours(ids))).max()
print("difference", difference)
assert difference < 1e-4
"""


def test_a_fresh_process_finds_an_installed_package_by_the_name_in_the_file(base, tmp_path, monkeypatch):
    (tmp_path / "their_package.py").write_text(PACKAGE)
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    namespace: dict = {"__name__": "their_package"}
    exec(PACKAGE, namespace)
    adapter = mixture(base, **SCOPES["ffn"] | {"top_k": None}, routing=namespace["Theirs"](power=0.5))
    moe_lora_interop.write(adapter, tmp_path / "adapter")

    def fresh():
        path = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)])
        environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "400"}
        command = [sys.executable, "-c", FRESH, str(base), str(tmp_path / "adapter")]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)

    done = fresh()
    assert done.returncode == 2
    assert "routing: 'theirs' is not registered, found none; import the module" in done.stderr
    (info / "entry_points.txt").write_text("[moe_lora.routings]\ntheirs = their_package\n")
    done = fresh()
    assert done.returncode == 0, done.stderr
    assert "gates by theirs (version 1, power=0.5)" in done.stdout
    (info / "entry_points.txt").write_text("[moe_lora.routings]\ntheirs = no_such_package\n")
    done = fresh()
    assert done.returncode == 2
    assert "'theirs' is declared as 'no_such_package', which cannot be imported" in done.stderr


def test_vllm_cannot_serve_it_and_says_so():
    config = MoeLoraConfig(routing=AGAIN, num_experts=2, target_modules=["q_proj"])
    (problem,) = vllm_needs("native", config, ["model.layers.0.self_attn.q_proj"]).problems
    assert problem.startswith("routing: found again, expected null; instead, PEFT runs it")
