"""The same adapter gives the same numbers in JAX and in PyTorch PEFT, in both directions and through training."""

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

import moe_lora_interop
import moe_lora_interop.peft_tuner as tuner
import moe_lora_jax as mlj
from moe_lora_interop.checkpoint.adapter import config_sizes
from moe_lora_interop.dialects import NATIVE
from moe_lora_interop.rules.tensors import decode, encode
from moe_lora_jax.adapters.jax_tree import JAX_TREE
from tests.hf import make_model, save_model

CONFIGS = {
    "dense": {},
    "top_k": dict(top_k=2),
    "top_k_not_normalised": dict(top_k=2, norm_topk_prob=False, routed_scaling_factor=1.5),
    "sigmoid": dict(top_k=2, scoring_func="sigmoid", router_bias=True),
    "abs_softmax": dict(top_k=2, scoring_func="abs_softmax", router_temperature=0.7),
    "identity": dict(top_k=2, scoring_func="identity", norm_topk_prob=False, router_bias=True),
    "first_pass": dict(scope="model", scaling_pass_value=0.4, routed_scaling_factor=1.5, router_bias=True),
    "sparsemax": dict(scoring_func="sparsemax", router_temperature=2.0),
    "temperature": dict(scoring_func="sparsemax", temperature_hidden_size=5, router_temperature=0.3),
    "threshold": dict(threshold=0.24),
    "adaptive": dict(threshold=0.4, adaptive_threshold=True),
    "shared_A": dict(shared_lora_A=True, use_rslora=True),
    "unequal": dict(r=[1, 2, 4, 3], lora_alpha=[1, 1, 2, 0.5]),
    "patterns": dict(
        top_k=2,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.*": 1},
        num_experts_pattern={"o_proj": 1, "gate_proj": 3},
        top_k_pattern={"up_proj": None},
    ),
}
IDS = np.random.default_rng(0).integers(3, 90, (3, 9))
MASK = np.array([[1] * 9, [1] * 6 + [0] * 3, [0] * 2 + [1] * 7])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(make_model("llama"), tmp_path_factory.mktemp("base"))


def config_of(name, **more):
    settings = dict(r=3, lora_alpha=1.5, num_experts=4, target_modules="all-linear", init_lora_weights=False)
    return {**settings, **CONFIGS[name], **more}


def jax_logits(model, ids=IDS, mask=MASK):
    return np.asarray(model(jnp.asarray(ids), attention_mask=jnp.asarray(mask)), np.float32)


def torch_model(base, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


def positions(mask=MASK):
    return torch.tensor(np.clip(np.cumsum(mask, -1) - 1, 0, None))


def torch_logits(model, ids=IDS, mask=MASK):
    with torch.no_grad():
        found = model(torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=positions(mask)).logits
    return found.float().numpy()


def trained_router(model, seed=1):
    """Routers far from their small initial values, so that selection and gates matter."""
    key = jax.random.key(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, mlj.MoeLoraParam)):
        if "router" in path:
            key, sub = jax.random.split(key)
            variable.set_value(0.5 * jax.random.normal(sub, variable.shape))
            nnx.update(model, nnx.from_flat_state({path: variable}))
    return model


def jax_model(base, name, **more):
    model = mlj.load_base_model(base)
    mlj.apply_moe_lora(model, mlj.MoeLoraConfig(**config_of(name, **more)), rngs=nnx.Rngs(0))
    return trained_router(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_by_jax_loaded_by_peft(base, tmp_path, name):
    model = jax_model(base, name)
    mlj.save_pretrained(model, tmp_path / "jax")
    loaded = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "jax")
    expected = jax_logits(model)
    real = MASK.astype(bool)
    scale = np.abs(expected[real]).max()
    assert np.abs(expected - jax_logits(mlj.load_base_model(base)))[real].max() > 1e-2 * scale
    np.testing.assert_allclose(torch_logits(loaded)[real], expected[real], atol=1e-5 * scale)

    loaded.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("jax", "peft"))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and tensor.tobytes() == theirs[key].tobytes(), key
    assert moe_lora_interop.read(tmp_path / "jax").config == moe_lora_interop.read(tmp_path / "peft").config


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_by_peft_loaded_by_jax(base, tmp_path, name):
    torch.manual_seed(0)
    model = peft.get_peft_model(torch_model(base), tuner.MoeLoraConfig(**config_of(name), task_type="CAUSAL_LM")).eval()
    for key, parameter in model.named_parameters():
        if any(f"moe_lora_{name}" in key for name in ("router", "threshold", "temperature")):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "peft")
    loaded = mlj.load_adapter(mlj.load_base_model(base), tmp_path / "peft")
    expected, real = torch_logits(model), MASK.astype(bool)
    np.testing.assert_allclose(jax_logits(loaded)[real], expected[real], atol=1e-5 * np.abs(expected[real]).max())

    mlj.save_pretrained(loaded, tmp_path / "jax")
    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("jax", "peft"))
    assert ours.keys() == theirs.keys() and all(ours[k].tobytes() == theirs[k].tobytes() for k in ours)


def test_bfloat16_adapters_keep_every_bit_through_peft(base, tmp_path):
    model = mlj.load_base_model(base)
    config = mlj.MoeLoraConfig(**config_of("top_k"))
    mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    mlj.save_pretrained(model, tmp_path / "jax")
    ours = moe_lora_interop.read(tmp_path / "jax")
    assert ours.tensors["model.layers.0.mlp.up_proj", "lora_A"].dtype == jnp.bfloat16

    for autocast, dtype in ((False, jnp.bfloat16), (True, jnp.float32)):
        loaded = peft.PeftModel.from_pretrained(
            torch_model(base, torch.bfloat16), tmp_path / "jax", autocast_adapter_dtype=autocast
        )
        loaded.save_pretrained(tmp_path / f"peft{autocast}")
        back = moe_lora_interop.read(tmp_path / f"peft{autocast}")
        for slot, tensor in ours.tensors.items():
            expected = tensor.astype(dtype) if slot[1] in ("lora_A", "lora_B") else tensor
            assert back.tensors[slot].dtype == expected.dtype, slot
            assert back.tensors[slot].tobytes() == expected.tobytes(), slot


@pytest.mark.parametrize("name", ["top_k", "adaptive", "patterns"])
def test_gradients_of_one_step(base, tmp_path, name):
    model = jax_model(base, name)
    mlj.save_pretrained(model, tmp_path)
    twin = peft.PeftModel.from_pretrained(torch_model(base), tmp_path, is_trainable=True)

    ours = adapter_gradients(model)
    torch_loss(twin, IDS).backward()
    theirs = {key.replace(".default", ""): p.grad.numpy() for key, p in twin.named_parameters() if p.grad is not None}
    stored = as_native(model, ours)
    assert stored.keys() == theirs.keys()
    for key, gradient in stored.items():
        module = key.split(".moe_lora_")[0]
        scale = max(np.abs(g).max() for k, g in theirs.items() if k.startswith(module))
        np.testing.assert_allclose(gradient, theirs[key], atol=1e-5 * scale, err_msg=key)


@pytest.mark.parametrize("name", ["top_k", "dense"])
def test_twenty_adamw_steps_give_the_same_curve_and_adapter(base, tmp_path, name):
    batches = np.random.default_rng(1).integers(3, 90, (20, 4, 8))
    model = mlj.load_base_model(base)
    config = mlj.MoeLoraConfig(**config_of(name, init_lora_weights=True))
    mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(0))
    trained_router(model)
    mlj.save_pretrained(model, tmp_path / "start")
    twin = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "start", is_trainable=True)

    options = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3, **options), wrt=mlj.MoeLoraParam)

    @nnx.jit
    def step(model, optimizer, ids):
        loss, gradients = nnx.value_and_grad(jax_loss, argnums=nnx.DiffState(0, mlj.MoeLoraParam))(model, ids)
        optimizer.update(model, gradients)
        return loss

    trainable = [p for p in twin.parameters() if p.requires_grad]
    torch_optimizer = torch.optim.AdamW(trainable, lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    ours, theirs = [], []
    for ids in batches:
        ours.append(float(step(model, optimizer, jnp.asarray(ids))))
        loss = torch_loss(twin, ids)
        torch_optimizer.zero_grad()
        loss.backward()
        torch_optimizer.step()
        theirs.append(float(loss.detach()))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert ours[-1] != ours[0]
    mlj.save_pretrained(model, tmp_path / "jax")
    twin.save_pretrained(tmp_path / "peft")
    mine, other = moe_lora_interop.read(tmp_path / "jax"), moe_lora_interop.read(tmp_path / "peft")
    for slot, tensor in mine.tensors.items():
        np.testing.assert_allclose(tensor, other.tensors[slot], atol=1e-4, err_msg=str(slot))


def test_on_a_bfloat16_base_the_delta_is_fp32_and_logits_differ_by_the_bases_own_noise(base, tmp_path):
    model = mlj.load_base_model(base, dtype="bfloat16")
    mlj.apply_moe_lora(model, mlj.MoeLoraConfig(**config_of("top_k")), rngs=nnx.Rngs(0))
    mlj.save_pretrained(trained_router(model), tmp_path)
    twin = peft.PeftModel.from_pretrained(torch_model(base, torch.bfloat16), tmp_path)

    x = np.random.default_rng(2).normal(size=(7, 32)).astype(np.float32)
    layer = model.model.layers[0].self_attn.q_proj
    other = twin.base_model.model.model.layers[0].self_attn.q_proj
    delta = np.asarray(layer.delta(jnp.asarray(x, jnp.bfloat16)))
    with torch.no_grad():
        found = other._delta("default", torch.tensor(x).bfloat16())
    assert delta.dtype == np.float32 and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), delta, atol=1e-5 * np.abs(delta).max())

    real = MASK.astype(bool)
    truth = jax_logits(mlj.load_adapter(mlj.load_base_model(base), tmp_path))[real]
    noise = np.abs(torch_logits(twin)[real] - truth).max()
    assert np.abs(jax_logits(model)[real] - truth).max() < 1.5 * noise


def jax_loss(model, ids):
    logits = model(ids)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def torch_loss(model, ids):
    ids = torch.tensor(ids)
    logits = model(ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def adapter_gradients(model):
    gradients = nnx.grad(jax_loss, argnums=nnx.DiffState(0, mlj.MoeLoraParam))(model, jnp.asarray(IDS))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(gradients)}


def as_native(model, by_path):
    """Gradients under the names of the native layout, moved by the same rules as the tensors."""
    sizes = config_sizes(model.moe_lora_config)
    canonical, problems = decode(JAX_TREE.rules, by_path, sizes)
    stored, more = encode(NATIVE.rules, canonical, sizes)
    assert not problems and not more
    return stored
