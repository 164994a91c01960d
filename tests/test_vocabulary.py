"""Any mixture that the config allows: JAX, PEFT and a plain numpy reference give the same logits, JAX and PEFT the same
gradients."""

import json
import shutil
import tempfile
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

import interop
import interop.peft_tuner  # noqa: F401  (registers)
import moe_lora_jax as mlj
from interop.adapter import config_sizes
from interop.config import MoeLoraConfig
from interop.dialects import JAX_TREE, NATIVE
from interop.errors import ConfigError
from interop.presence import block_of, expected_tensors
from interop.rules import axes_of, decode, encode
from tests.hf import make_model, save_model
from tests.numpy_mixture import NumpyMixture

pytestmark = THIRD_PARTY_WARNINGS
IDS = np.random.default_rng(0).integers(3, 90, (2, 5))
TASKS = 4
ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(make_model("llama", hidden_size=16, intermediate_size=24), tmp_path_factory.mktemp("base"))


@st.composite
def configs(draw) -> MoeLoraConfig:
    """A valid config; a drawn combination that the config refuses is drawn anew."""
    scope = draw(st.sampled_from(["linear", "ffn", "model"]))
    router_input = draw(st.sampled_from(["hidden", "task"])) if scope != "ffn" else "hidden"
    mix = draw(st.sampled_from(["outputs", "weights"])) if scope != "ffn" else "outputs"
    experts = draw(st.integers(2, 4))
    fields = dict(
        scope=scope,
        router_input=router_input,
        mix=mix,
        num_experts=experts,
        scoring_func=draw(st.sampled_from(["softmax", "abs_softmax", "sigmoid"])),
        router_temperature=draw(st.sampled_from([1.0, 0.7])),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 1.5])),
        use_rslora=draw(st.booleans()),
        n_splits=draw(st.sampled_from([1, 2])) if mix == "weights" else 1,
    )
    selection = draw(st.sampled_from(["dense", "top_k", "threshold", "adaptive"]))
    if selection == "top_k":
        fields["top_k"] = draw(st.integers(1, experts))
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
    fields["router_bias"] = fields.get("router_depth") != 0 and draw(st.booleans())
    if mix == "outputs":
        fields["r"] = draw(st.one_of(st.just(2), st.lists(st.integers(1, 3), min_size=experts, max_size=experts)))
        alphas = st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=experts, max_size=experts)
        fields["lora_alpha"] = draw(st.one_of(st.just(2.0), alphas))
        fields["shared_lora_A"] = isinstance(fields["r"], int) and draw(st.booleans())
    else:
        fields |= {"r": 2, "lora_alpha": 3.0}
    names = draw(st.lists(st.sampled_from(ATTENTION + FEED_FORWARD), min_size=1, max_size=5, unique=True))
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
        fields["top_k_pattern"] = draw(st.sampled_from([{}, {"layers.1.*": 1}, {"layers.0.*": None}]))
    try:
        return MoeLoraConfig(**fields)
    except ConfigError:
        hypothesis.reject()


def adapter_of(config: MoeLoraConfig, base: Path, seed: int = 0) -> interop.Adapter:
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
                padding = (expert, slice(ranks[expert], None)) if role == "lora_A" else (expert, ..., slice(ranks[expert], None))
                tensor[padding] = 0
            tensor *= tensor.shape[-1] ** -0.5
        tensors[module, role] = tensor
    return interop.Adapter(config, tensors)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(configs(), st.booleans())
def test_jax_peft_and_numpy_agree_on_any_config(base, config, several_ids):
    adapter = adapter_of(config, base)
    tasks = np.array([[2, 0, 3], [0, 0, 0]]) if several_ids else np.array([3, 0])
    tasks = tasks if config.router_input == "task" else None
    truth = NumpyMixture(load_file(base / "model.safetensors"), json.loads((base / "config.json").read_text()), adapter)
    expected = truth.logits(IDS, tasks)
    hypothesis.assume(truth.margin > 1e-4)
    scale = np.abs(expected).max()

    directory = Path(tempfile.mkdtemp())
    try:
        interop.write(adapter, directory)
        jax_model = mlj.load_adapter(mlj.load_base_model(base), directory)
        torch_model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        torch_model = peft.PeftModel.from_pretrained(torch_model, directory, is_trainable=True).eval()
    finally:
        shutil.rmtree(directory)
    jax_value, jax_gradients = of_jax(jax_model, tasks)
    torch_value, torch_gradients = of_torch(torch_model, tasks)
    np.testing.assert_allclose(torch_value, expected, atol=1e-5 * scale, err_msg="torch")
    np.testing.assert_allclose(jax_value, expected, atol=1e-5 * scale, err_msg="jax")
    assert jax_gradients.keys() == torch_gradients.keys()
    largest = max(np.abs(g).max() for g in torch_gradients.values())
    for key, gradient in torch_gradients.items():
        np.testing.assert_allclose(jax_gradients[key], gradient, atol=1e-5 * largest, err_msg=key)


def of_jax(model, tasks):
    extra = {} if tasks is None else {"task_ids": jnp.asarray(tasks)}

    def loss(model):
        logits = model(jnp.asarray(IDS), **extra)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], IDS[:, 1:]).mean(), logits

    gradients, logits = nnx.grad(loss, argnums=nnx.DiffState(0, mlj.MoeLoraParam), has_aux=True)(model)
    by_path = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(gradients)}
    canonical, problems = decode(JAX_TREE.rules, by_path, config_sizes(model.moe_lora_config))
    stored, more = encode(NATIVE.rules, canonical, config_sizes(model.moe_lora_config))
    assert not problems and not more
    return np.asarray(logits), stored


def of_torch(model, tasks):
    ids = torch.tensor(IDS)
    if tasks is None:
        logits = model(ids).logits
    else:
        with model.base_model.task_routing(tasks):
            logits = model(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    name = model.base_model._remove_adapter_name_from_key
    gradients = {name(k, "default"): p.grad for k, p in model.named_parameters() if p.requires_grad}
    return logits.detach().numpy(), {k: np.zeros(1) if g is None else g.numpy() for k, g in gradients.items()}


def test_jax_is_imported_for_comparison_only():
    assert jax.__version__
