"""Loading base models: every tensor is used, checked, or named in the error."""

import json
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

from moe_lora_interop.errors import CheckpointError
from moe_lora_jax.models import load_base_model
from tests.hf import VOCAB, Saved, make_model, save_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory)


@pytest.fixture
def copy_of(saved, tmp_path):
    """case -> a copy of that saved model that the test may damage."""
    return lambda case: saved.copy(case, tmp_path)


def tokens():
    return np.random.default_rng(0).integers(3, VOCAB, (2, 24))


def test_config_keeps_where_it_came_from_and_is_static(saved):
    directory = saved("llama")[1]
    config = load_base_model(directory).config
    assert config.name_or_path == str(directory)
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))


def test_stored_dtype_is_kept_and_others_are_cast(saved, tmp_path):
    save_model(make_model("llama").to(torch.bfloat16), tmp_path)
    stored = load_base_model(tmp_path)
    assert stored.config.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(stored))} == {"bfloat16"}
    raw = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(stored.model.layers[1].mlp.down_proj.kernel[...].T, raw)
    wide = load_base_model(tmp_path, dtype=jnp.float32)
    np.testing.assert_array_equal(wide.model.layers[1].mlp.down_proj.kernel[...].T, raw.astype(np.float32))
    half = load_base_model(saved("llama")[1], dtype="float16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(half))} == {"float16"}
    with pytest.raises(ValueError, match="dtype: found 'int8', expected None or one of float32"):
        load_base_model(tmp_path, dtype="int8")


def test_mixed_dtypes_follow_the_config_or_are_asked_for(copy_of):
    config, tensors, write = copy_of("llama")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)
    assert load_base_model(write()).config.dtype == "float32"
    del config["dtype"]
    with pytest.raises(CheckpointError, match="tensors: found BF16, F32, expected one dtype"):
        load_base_model(write())
    assert load_base_model(write(), dtype="bfloat16").config.dtype == "bfloat16"


def test_shards_equal_the_single_file(saved, tmp_path):
    save_model(make_model("llama"), tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, parts = load_base_model(saved("llama")[1]), load_base_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(parts), nnx.state(whole))


def test_overwriting_the_file_does_not_change_the_loaded_model(copy_of):
    _, tensors, write = copy_of("llama")
    model = load_base_model(write())
    before = np.array(model(tokens()))
    for tensor in tensors.values():
        tensor[...] = 0
    write()
    np.testing.assert_array_equal(model(tokens()), before)


def test_generation_config_overrides_the_ending_ids(copy_of):
    config, _, write = copy_of("llama")
    config |= {"eos_token_id": 2, "pad_token_id": 5}
    directory = write()
    before = load_base_model(directory).config
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    after = load_base_model(directory).config
    assert (before.eos_token_id, before.pad_token_id) == ((2,), 5)
    assert (after.eos_token_id, after.pad_token_id) == ((7, 8), 5)


def test_inert_buffers_and_an_equal_tied_head_are_tolerated(copy_of):
    _, tensors, write = copy_of("llama_tied")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float64)
    tensors["model.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    model = load_base_model(write())
    assert not hasattr(model, "lm_head") and model.config.dtype == "float32"
    tensors["lm_head.weight"][3, 3] += 1
    with pytest.raises(CheckpointError, match="lm_head.weight: found other values, expected those of model.embed"):
        load_base_model(write())


def test_all_wrong_tensors_are_in_one_error(copy_of):
    _, tensors, write = copy_of("llama")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 16), np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 32), np.int8)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    tensors["model.layers.2.input_layernorm.weight"] = np.zeros(32, np.float32)
    with pytest.raises(CheckpointError) as caught:
        load_base_model(write())
    assert sorted(caught.value.problems) == [
        "model.layers.0.self_attn.q_proj.bias: unexpected tensor of shape (32,)",
        "model.layers.0.self_attn.q_proj.weight: found shape (32, 16), expected (32, 32)",
        "model.layers.1.mlp.up_proj.weight: found I8, expected one of F32, BF16, F16",
        "model.layers.2.input_layernorm.weight: unexpected tensor of shape (32,)",
        "model.norm.weight: missing, expected shape (32,)",
    ]


def test_an_untied_model_without_its_head_is_refused(copy_of):
    _, tensors, write = copy_of("llama")
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head.weight: missing, expected shape \(97, 32\)"):
        load_base_model(write())


def test_unreadable_directories_say_what_is_wrong(copy_of, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(CheckpointError, match="nowhere:\n  - found no directory, expected a local one"):
        load_base_model(empty / "nowhere")
    with pytest.raises(CheckpointError, match="config.json"):
        load_base_model(empty)
    (empty / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="unreadable JSON:\n  - .*config.json"):
        load_base_model(empty)
    (empty / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="found list, expected an object"):
        load_base_model(empty)

    directory = copy_of("llama")[2]()
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="model.safetensors: .*incomplete"):
        load_base_model(directory)
    file.unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor model.safetensors.index.json$"):
        load_base_model(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pickle: save the model as safetensors"):
        load_base_model(directory)


def test_a_broken_index_is_refused(tmp_path):
    save_model(make_model("llama"), tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    good = dict(index["weight_map"])
    first, last = sorted(set(good.values()))[0], sorted(set(good.values()))[-1]
    moved = next(key for key, name in good.items() if name == first)

    def load_with(weight_map):
        path.write_text(json.dumps({**index, "weight_map": weight_map}))
        load_base_model(tmp_path)

    with pytest.raises(CheckpointError, match=f"{moved}: found in {first}, but the index says {last}"):
        load_with(good | {moved: last})
    with pytest.raises(CheckpointError, match=f"extra: not in {last}, where the index puts it"):
        load_with(good | {"extra": last})
    with pytest.raises(CheckpointError, match="'../other.safetensors' is not a file name"):
        load_with(good | {moved: "../other.safetensors"})
    with pytest.raises(CheckpointError, match="weight_map: missing or empty"):
        load_with({})
    (tmp_path / last).unlink()
    with pytest.raises(CheckpointError, match=f"{last}: "):
        load_with(good)


def test_torch_is_not_imported(saved):
    """In a fresh process where importing torch or transformers fails."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from moe_lora_jax.models import load_base_model\n"
        "print(load_base_model(sys.argv[1]).config.architecture)"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(saved("llama")[1])]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "LlamaForCausalLM"
