"""Any mixture that the config allows: JAX, PEFT and a plain numpy reference give the same logits, JAX and PEFT the same
gradients."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file
from test_peft_support import THIRD_PARTY_WARNINGS

import moe_lora_interop
import moe_lora_interop.peft_tuner  # noqa: F401  (registers)
import moe_lora_jax as mlj
from moe_lora_interop.checkpoint.adapter import config_sizes
from moe_lora_interop.checkpoint.implied_tensors import expected_tensors
from moe_lora_interop.config.adapter_config import MoeLoraConfig
from moe_lora_interop.config.modules import block_of
from moe_lora_interop.dialects import NATIVE
from moe_lora_interop.errors import ConfigError
from moe_lora_interop.rules.tensors import axes_of, decode, encode
from moe_lora_jax.adapters.jax_tree import JAX_TREE
from tests.hf import make_model, save_model
from tests.numpy_mixture import NumpyMixture
from tests.routings import SignedRoot

pytestmark = THIRD_PARTY_WARNINGS
IDS = np.random.default_rng(0).integers(3, 90, (2, 5))
TASKS = 4
ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{layers: directory}"""
    sizes = dict(hidden_size=16, intermediate_size=24)
    return {
        layers: save_model(make_model("llama", num_hidden_layers=layers, **sizes), tmp_path_factory.mktemp("base"))
        for layers in (1, 2)
    }


FAMILIES = {
    "linear": ("linear", "hidden", "outputs"),
    "codes": ("linear", "expert_activations", "outputs"),
    "linear_weights": ("linear", "hidden", "weights"),
    "tasks": ("linear", "task", "weights"),
    "ffn": ("ffn", "hidden", "outputs"),
    "model": ("model", "hidden", "outputs"),
    "model_tasks": ("model", "task", "outputs"),
}
family = pytest.mark.parametrize("family", FAMILIES)


def settings(examples: int) -> hypothesis.settings:
    """The same examples every time. They are not shrunk, which would take longer than all of them."""
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@st.composite
def configs(draw, scope: str, router_input: str, usual_mix: str) -> MoeLoraConfig:
    """A config of this family with everything else drawn; a combination that the config refuses is drawn anew."""
    other_mix = "outputs" if usual_mix == "weights" else "weights"
    mix = usual_mix if scope == "ffn" else draw(st.sampled_from([usual_mix, usual_mix, other_mix]))
    experts = draw(st.integers(2, 4))
    fields = dict(
        scope=scope,
        router_input=router_input,
        mix=mix,
        num_experts=experts,
        scoring_func=draw(st.sampled_from(["softmax", "abs_softmax", "sigmoid", "identity", "sparsemax"])),
        router_temperature=draw(st.sampled_from([1.0, 0.7])),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 1.5])),
        use_rslora=draw(st.booleans()),
        n_splits=draw(st.sampled_from([1, 2])) if mix == "weights" else 1,
    )
    selection = draw(st.sampled_from(["dense", "top_k", "threshold", "adaptive"]))
    if selection == "top_k":
        fields["top_k"] = draw(st.integers(1, experts))
        fields["top_p"] = draw(st.sampled_from([None, None, 0.6]))
        fields |= draw(st.sampled_from([{}, {}, {"entropy_threshold": 0.8, "entropy_eps": 1e-3}]))
        fields["entropy_index"] = draw(st.sampled_from([1.0, 1.7]))
    if selection in ("threshold", "adaptive"):
        fields |= {"threshold": draw(st.sampled_from([0.2, 0.5])), "adaptive_threshold": selection == "adaptive"}
    if router_input == "task":
        fields["num_tasks"] = TASKS
        has_router = scope == "model" and draw(st.booleans())
        fields |= {"task_embedding_dim": 5} if has_router else {"router_depth": 0}
    if scope == "model" and fields.get("router_depth") != 0:
        fields["router_depth"] = draw(st.integers(1, 3))
        fields["router_hidden_size"] = 6 if fields["router_depth"] > 1 else None
        fields["layerwise"] = router_input == "hidden" and fields["n_splits"] == 1 and draw(st.booleans())
    if scope != "model" and router_input == "hidden":
        fields["temperature_hidden_size"] = draw(st.sampled_from([None, None, 3]))
    fields["router_bias"] = fields.get("router_depth") != 0 and draw(st.booleans())
    if mix == "outputs":
        fields["r"] = draw(st.one_of(st.just(2), st.lists(st.integers(1, 3), min_size=experts, max_size=experts)))
        alphas = st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=experts, max_size=experts)
        fields["lora_alpha"] = draw(st.one_of(st.just(2.0), alphas))
        fields["shared_lora_A"] = isinstance(fields["r"], int) and draw(st.booleans())
    else:
        fields |= {"r": 2, "lora_alpha": 3.0}
    names = draw(st.lists(st.sampled_from(ATTENTION + FEED_FORWARD), min_size=2, max_size=5, unique=True))
    alone = draw(st.lists(st.sampled_from(names), max_size=1))
    if scope == "ffn":  # one block is the feed-forward block: what is targeted in attention is plain LoRA
        names = sorted({*names, draw(st.sampled_from(FEED_FORWARD))})
        alone = sorted({*alone, *ATTENTION} & set(names))
    fields["target_modules"] = sorted(names)
    fields["num_experts_pattern"] = dict.fromkeys(alone, 1)
    if isinstance(fields["r"], list):
        fields["rank_pattern"] = dict.fromkeys(alone, 2)
    if isinstance(fields["lora_alpha"], list):
        fields["alpha_pattern"] = dict.fromkeys(alone, 1.0)
    if scope == "linear" and selection == "top_k":
        fields["top_k_pattern"] = draw(st.sampled_from([{}, {"layers.0.*": 1}, {"layers.0.*": None}]))
    try:
        return MoeLoraConfig(**fields)
    except ConfigError:
        hypothesis.reject()


def adapter_of(config: MoeLoraConfig, base: Path, seed: int = 0) -> moe_lora_interop.Adapter:
    """Random tensors for every slot that the config implies on this base."""
    shapes = {k.removesuffix(".weight"): v.shape for k, v in load_file(base / "model.safetensors").items()}
    linears = [m for m in shapes if m.endswith("_proj")]
    rng, tensors = np.random.default_rng(seed), {}
    modules = config.targets.select(linears)
    block_in = {block_of(m): shapes[m][0] for m in linears if m.endswith("down_proj")}
    hidden = json.loads((base / "config.json").read_text())["hidden_size"]
    for (module, role), known in expected_tensors(config, modules).items():
        out, inside = shapes.get(module, (None, block_in.get(module, hidden)))
        sizes = {"in": inside, "out": out, "one": 1} | known
        tensor = rng.normal(size=[sizes[axis] for axis in axes_of(role).split()]).astype(np.float32)
        if role.startswith("lora"):
            ranks = config.for_module(module).ranks
            for expert in range(len(tensor)):
                padding = (
                    (expert, slice(ranks[expert], None))
                    if role == "lora_A"
                    else (expert, ..., slice(ranks[expert], None))
                )
                tensor[padding] = 0
            tensor *= 0.7 * tensor.shape[-1] ** -0.5
        tensors[module, role] = tensor
    return moe_lora_interop.Adapter(config, tensors)


TASK_IDS = st.sampled_from([np.array([3, 0]), np.array([[2, 0, 3], [0, 0, 0]])])


def truth(base: Path, adapter: moe_lora_interop.Adapter, tasks: np.ndarray | None) -> tuple[np.ndarray, bool]:
    """The truth, and whether it does not hang on the last bits of fp32."""
    weights, config = load_file(base / "model.safetensors"), json.loads((base / "config.json").read_text())
    mixture = NumpyMixture(weights, config, adapter)
    return mixture.logits(IDS, tasks), mixture.margin > 1e-4


def reference(base: Path, adapter: moe_lora_interop.Adapter, tasks: np.ndarray | None) -> np.ndarray:
    logits, is_sure = truth(base, adapter, tasks)
    hypothesis.assume(is_sure)
    return logits


@contextmanager
def native(adapter: moe_lora_interop.Adapter) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        moe_lora_interop.write(adapter, directory)
        yield Path(directory)


@family
@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_peft_equals_the_formula_on_any_config(bases, family):
    base = bases[2]

    @settings(12)
    @hypothesis.given(configs(*FAMILIES[family]), TASK_IDS)
    def check(config, tasks):
        tasks = tasks if config.router_input == "task" else None
        adapter = adapter_of(config, base)
        expected = reference(base, adapter, tasks)
        with native(adapter) as directory:
            logits, _ = of_torch(base, directory, tasks)
        np.testing.assert_allclose(logits, expected, atol=3e-5 * np.abs(expected).max())  # the base in fp32, too

    check()


@family
@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_jax_peft_and_the_formula_agree_on_any_config(bases, family):
    base = bases[1]  # compiling takes longer than all else

    @settings(3)
    @hypothesis.given(configs(*FAMILIES[family]), TASK_IDS)
    def check(config, tasks):
        tasks = tasks if config.router_input == "task" else None
        adapter = adapter_of(config, base)
        assert_all_agree(base, adapter, reference(base, adapter, tasks), tasks)

    check()


ATTENTION_ALONE = {"num_experts_pattern": dict.fromkeys(ATTENTION, 1)}
SIGNED = {"scoring_func": "identity", "norm_topk_prob": False}
WORDS = {
    "signed": {**SIGNED, "router_bias": True},
    "signed top 2 of whole blocks": {**SIGNED, "scope": "ffn", "top_k": 2, **ATTENTION_ALONE},
    "codes": {"router_input": "expert_activations", **SIGNED, "router_bias": True},
    "codes of one A": {"router_input": "expert_activations", "shared_lora_A": True, "top_k": 2, "router_bias": True},
    "top p": {"top_k": 1, "top_p": 0.7, "norm_topk_prob": False},
    "entropy of whole blocks": {"scope": "ffn", "top_k": 1, "top_p": 0.6, "entropy_threshold": 0.7, **ATTENTION_ALONE},
    "sparse": {"scoring_func": "sparsemax", "router_temperature": 2.0},
    "sparse, at a temperature of its own": {"scoring_func": "sparsemax", "temperature_hidden_size": 5},
    "whole blocks at a temperature of their own": {"scope": "ffn", "temperature_hidden_size": 5, **ATTENTION_ALONE},
    "signed, weights mixed, own temperature": {**SIGNED, "mix": "weights", "n_splits": 2, "temperature_hidden_size": 3},
    "somebody else's routing": {"routing": SignedRoot(power=2.0), "top_k": 2, "router_bias": True},
    "somebody else's routing of whole blocks": {"routing": SignedRoot(), "scope": "ffn", "top_k": 2, **ATTENTION_ALONE},
    "somebody else's routing of the model": {"routing": SignedRoot(), "scope": "model", "layerwise": True},
    "signed top 1 of the model": {**SIGNED, "scope": "model", "top_k": 1, "router_temperature": 0.5},
}


@pytest.mark.parametrize("word", WORDS)
def test_words_that_chance_may_miss(bases, word):
    config = MoeLoraConfig(num_experts=4, r=2, target_modules=["q_proj", "up_proj", "down_proj"], **WORDS[word])
    adapter = adapter_of(config, bases[1])
    expected, is_sure = truth(bases[1], adapter, None)
    assert is_sure
    assert_all_agree(bases[1], adapter, expected, None)


def assert_all_agree(base: Path, adapter: moe_lora_interop.Adapter, expected: np.ndarray, tasks: np.ndarray | None):
    with native(adapter) as directory:
        ours, our_gradients = of_jax(base, directory, tasks)
        theirs, their_gradients = of_torch(base, directory, tasks)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, atol=1e-5 * scale)
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * scale)
    assert our_gradients.keys() == their_gradients.keys()
    largest = max(np.abs(g).max() for g in their_gradients.values())
    for key, gradient in their_gradients.items():
        np.testing.assert_allclose(our_gradients[key], gradient, atol=1e-5 * largest, err_msg=key)


def of_jax(base: Path, directory: Path, tasks: np.ndarray | None):
    """Logits, and gradients of the language model's loss under the names of the native layout."""
    model = mlj.load_adapter(mlj.load_base_model(base), directory)
    extra = {} if tasks is None else {"task_ids": jnp.asarray(tasks)}
    graphdef, adapter, rest = nnx.split(model, mlj.MoeLoraParam, ...)

    def loss(adapter, rest):
        logits = nnx.merge(graphdef, adapter, rest, copy=True)(jnp.asarray(IDS), **extra)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], IDS[:, 1:]).mean(), logits

    step = jax.jit(jax.grad(loss, has_aux=True), compiler_options={"xla_backend_optimization_level": 0})
    gradients, logits = step(adapter, rest)
    flat = nnx.to_flat_state(gradients)
    by_path = {".".join(str(p) for p in path if p != "base_layer"): np.asarray(leaf[...]) for path, leaf in flat}
    canonical, problems = decode(JAX_TREE.rules, by_path, config_sizes(model.moe_lora_config))
    stored, more = encode(NATIVE.rules, canonical, config_sizes(model.moe_lora_config))
    assert not problems and not more
    return np.asarray(logits), stored


def of_torch(base: Path, directory: Path, tasks: np.ndarray | None):
    """The same in PyTorch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, directory, is_trainable=True).eval()
    ids = torch.tensor(IDS)
    with nullcontext() if tasks is None else model.base_model.task_routing(tasks):
        logits = model(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    name = model.base_model._remove_adapter_name_from_key
    trained = {name(k, "default"): p for k, p in model.named_parameters() if p.requires_grad}
    gradients = {k: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for k, p in trained.items()}
    return logits.detach().numpy(), gradients
