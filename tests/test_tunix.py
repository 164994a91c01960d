"""A model and the trainer of google-tunix, unchanged (`make tunix`; the package has an environment of its own)."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import moe_lora_jax as mlj
from tests.mesh_base import write_base
from tests.toy import assert_same_leaves, leaves

if importlib.util.find_spec("tunix") is None:
    pytest.skip("google-tunix is not installed beside the project (make tunix)", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # tunix calls what flax 0.12 has deprecated

IDS = np.random.default_rng(0).integers(3, 90, (2, 7))
NAMES = {
    "layers.{l}.attn.{p}_proj": "model.layers.{l}.self_attn.{p}_proj",
    "layers.{l}.mlp.{p}_proj": "model.layers.{l}.mlp.{p}_proj",
    "lm_head": "lm_head",
}


def spec():
    from tunix.models.llama3.model import Einsum

    return mlj.ModelSpec(
        names=NAMES, layers={Einsum: lambda layer: mlj.LinearMap.of_einsum(layer.einsum_str, layer.shape)}
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    # tunix 0.1.7 leaves rope_theta at 1e6, whatever its config says
    return write_base(tmp_path_factory.mktemp("tunix") / "base", vocab_size=97, rms_norm_eps=1e-6, rope_theta=1e6)


def tunix_llama(base):
    """tunix's Llama with the weights that transformers saved."""
    from tunix.models.llama3 import model as llama3

    sizes = dict(num_layers=2, vocab_size=97, embed_dim=32, hidden_dim=48, num_heads=4, head_dim=8, num_kv_heads=2)
    config = llama3.ModelConfig(**sizes, rope_theta=1_000_000, norm_eps=1e-6)
    model, stored = llama3.Llama3(config, rngs=nnx.Rngs(0)), load_file(base / "model.safetensors")
    theirs = {"embedder.input_embedding": "model.embed_tokens", "final_norm.w": "model.norm", "lm_head.w": "lm_head"}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        ours = theirs.get(name) or f"model.{name.rpartition('.')[0]}".replace(".attn.", ".self_attn.")
        tensor = stored.pop(f"{ours}.weight")
        tensor = tensor if tensor.ndim == 1 or "embedder" in name else tensor.T
        nnx.update(model, nnx.from_flat_state({path: variable.replace(jnp.asarray(tensor.reshape(variable.shape)))}))
    assert not stored
    return model


def inputs(ids):
    seq = ids.shape[1]
    mask = jnp.broadcast_to(jnp.tri(seq, dtype=bool), (len(ids), seq, seq))
    return dict(positions=jnp.broadcast_to(jnp.arange(seq), ids.shape), cache=None, attention_mask=mask)


def logits(model, ids=IDS):
    return np.asarray(model(jnp.asarray(ids), **inputs(ids))[0])


def test_peft_trainer_trains_it_and_others_load_it(base, tmp_path):
    from tunix.sft import peft_trainer

    model = tunix_llama(base)
    expected = np.asarray(mlj.load_base_model(base, dtype="float32")(jnp.asarray(IDS)))
    np.testing.assert_allclose(logits(model), expected, atol=1e-5 * np.abs(expected).max())

    frozen = leaves(model)
    config = mlj.MoeLoraConfig(r=2, num_experts=3, top_k=2, target_modules="all-linear")
    mlj.apply_moe_lora(model, config, rngs=nnx.Rngs(0), spec=spec())
    start = leaves(model, mlj.MoeLoraParam)
    settings = peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=5)
    trainer = peft_trainer.PeftTrainer(model, optax.adam(3e-2), settings).with_gen_model_input_fn(
        lambda batch: {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": inputs(batch.input_tokens)["positions"],
            "attention_mask": inputs(batch.input_tokens)["attention_mask"],
        }
    )
    batch = peft_trainer.TrainingInput(input_tokens=IDS, input_mask=np.ones(IDS.shape, bool))
    trainer.train([batch] * 5)

    trained = leaves(model, mlj.MoeLoraParam)
    assert [name for name in start if (trained[name] == start[name]).all()] == []
    unchanged = {name.replace("base_layer.", ""): value for name, value in leaves(model).items()}
    assert_same_leaves({name: unchanged[name] for name in frozen}, frozen)
    after = logits(model)
    scale = np.abs(after).max()
    assert np.abs(after - expected).max() > 1e-2 * scale

    mlj.save_pretrained(model, tmp_path)
    ours = mlj.load_adapter(mlj.load_base_model(base, dtype="float32"), tmp_path)
    np.testing.assert_allclose(np.asarray(ours(jnp.asarray(IDS))), after, atol=2e-5 * scale)
    again = mlj.load_adapter(tunix_llama(base), tmp_path, spec=spec())
    np.testing.assert_array_equal(logits(again), after)
    if importlib.util.find_spec("torch"):  # not on the Pythons of `make current`
        assert_peft_agrees(base, tmp_path, after)


def assert_peft_agrees(base, adapter, expected):
    import peft
    import torch
    import transformers

    import moe_lora_interop.peft_tuner  # noqa: F401  registers MOE_LORA

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(model, adapter).eval()(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
