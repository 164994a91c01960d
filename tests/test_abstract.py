"""A model of shapes: the states and the lowered train step are those of the same model with its arrays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from mesh_base import CONFIG, write_base

import moe_lora_jax as mlj
from moe_lora_interop.errors import CheckpointError, ConfigError
from moe_lora_jax.sharding import is_abstract

WORKER = Path(__file__).parent / "abstract_worker.py"


def test_a_step_of_shapes_is_that_of_the_arrays(tmp_path):
    """On one device and on four meshes of eight, with the dtypes, the places and the text of the program."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, WORKER, write_base(tmp_path / "base")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 5 and found == dict.fromkeys(found, [])


def test_a_config_alone_makes_the_model(tmp_path):
    base = write_base(tmp_path / "base")  # in float32, whatever the file then says
    for file in (base / "config.json", tmp_path / "alone.json"):
        file.write_text(json.dumps({**CONFIG, "dtype": "bfloat16"}))
    read = {
        "float32": mlj.abstract_base_model(base),
        "bfloat16": mlj.abstract_base_model(tmp_path / "alone.json"),
        "float16": mlj.abstract_base_model({**CONFIG, "dtype": "bfloat16"}, dtype="float16"),
    }
    loaded = nnx.state(mlj.load_base_model(base))
    for dtype, model in read.items():
        state = nnx.state(model)
        assert is_abstract(model) and jax.tree.structure(state) == jax.tree.structure(loaded)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(dtype)}
    assert read["float32"].config.name_or_path == str(base)


def test_nothing_of_a_large_model_is_in_memory():
    large = {**CONFIG, "hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 3, "vocab_size": 200_000}
    before = len(jax.live_arrays())
    model = mlj.abstract_base_model(large, dtype="bfloat16")
    mlj.apply_moe_lora(model, mlj.MoeLoraConfig(r=64, num_experts=64, target_modules="all-linear"), rngs=nnx.Rngs(0))
    assert model.moe_lora_config.num_experts == 64
    assert model.model.layers[2].mlp.up_proj.lora_a.shape == (64, 64, 16384)
    assert len(jax.live_arrays()) <= before + 4  # the keys of nnx.Rngs
    mlj.remove_moe_lora(model)
    assert type(model.model.layers[2].mlp.up_proj) is nnx.Linear


def test_what_cannot_be_is_refused_in_words(tmp_path):
    with pytest.raises(ConfigError, match="dtype: found none in config.json"):
        mlj.abstract_base_model(CONFIG)
    with pytest.raises(ConfigError, match="architectures: "):
        mlj.abstract_base_model({**CONFIG, "architectures": ["Other"]}, dtype="float32")
    with pytest.raises(ValueError, match="dtype: found 'int8'"):
        mlj.abstract_base_model(CONFIG, dtype="int8")
    with pytest.raises(ValueError, match="remat: found 'all'"):
        mlj.abstract_base_model(CONFIG, dtype="float32", remat="all")
    with pytest.raises(CheckpointError, match="nothing.json"):
        mlj.abstract_base_model(tmp_path / "nothing.json")
    mesh = mlj.make_mesh({"fsdp": 2, "tensor": 2}, devices=jax.devices() * 4)
    with pytest.raises(
        ConfigError, match=r"lm_head.kernel: found 65 in shape \(32, 65\), expected a multiple of tensor"
    ):
        mlj.abstract_base_model({**CONFIG, "vocab_size": 65}, dtype="float32", mesh=mesh)
    with pytest.raises(ConfigError, match="expected numbers whose product is that of devices, 1"):
        mlj.make_mesh({"fsdp": 2}, devices=jax.devices())
    model = mlj.abstract_base_model(CONFIG, dtype="float32")
    with pytest.raises(ConfigError, match="target_modules"):
        mlj.apply_moe_lora(model, mlj.MoeLoraConfig(target_modules=["nowhere"]), rngs=nnx.Rngs(0))
