"""LD-MoLE's layout: temperature networks that its layers share, stored under every layer whatever the layer's width."""

import json
import shutil

import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import moe_lora_interop
import moe_lora_jax as mlj
from moe_lora_interop.disk import torch_files
from tests.peers_data import Peer
from tests.test_peers import assert_identical

PEERS = ["ld_mole/sparsegen", "ld_mole/sparsegen_attention"]
ERRORS = (moe_lora_interop.CheckpointError, moe_lora_interop.ConfigError)
DOWN = "base_model.model.model.layers.1.mlp.down_proj.sparsegen.mlp.proj_layers"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.bin"


@pytest.fixture
def copied(tmp_path):
    """(directory, its config, its tensors) of the peer with two widths, and how to save them changed."""
    made = tmp_path / "made"
    shutil.copytree(Peer(PEERS[0]).directory, made)

    def save(config=None, tensors=None):
        if config is not None:
            (made / CONFIG).write_text(json.dumps(config))
        if tensors is not None:
            torch_files.write(made / WEIGHTS, tensors)
        return made

    return json.loads((made / CONFIG).read_text()), torch_files.read(made / WEIGHTS), save


@pytest.mark.parametrize("name", PEERS)
def test_written_back_with_every_copy_it_is_the_peers_own(name, tmp_path):
    peer = Peer(name)
    moe_lora_interop.convert(peer.directory, tmp_path / "native")
    moe_lora_interop.convert(tmp_path / "native", tmp_path / "theirs", to="ld-mole", duplicates=True)
    found, expected = (torch_files.read(d / WEIGHTS) for d in (tmp_path / "theirs", peer.directory))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
        assert found[key].tobytes() == tensor.tobytes(), key
    ours, theirs = (json.loads((d / CONFIG).read_text()) for d in (tmp_path / "theirs", peer.directory))
    assert ours["sparsegen_cfg"] == theirs["sparsegen_cfg"]
    assert {n: theirs[n] for n in ours if n != "target_modules" and ours[n] is not None}.items() <= ours.items()


def test_written_once_a_module_has_the_network_of_its_own_width(tmp_path):
    adapter = moe_lora_interop.read(Peer(PEERS[0]).directory)
    moe_lora_interop.write(adapter, tmp_path, "ld-mole")
    found = torch_files.read(tmp_path / WEIGHTS)
    widths = {key.split(".sparsegen.")[0]: key.split(".")[-3] for key in found if ".sparsegen." in key}
    assert {m.split(".")[-1]: width for m, width in widths.items()} == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), "32"),
        "down_proj": "48",
    }
    assert sum(".sparsegen." in key for key in found) == 4 * len(adapter.modules)
    assert_identical(moe_lora_interop.read(tmp_path), adapter)


@pytest.mark.parametrize("place", [f"{DOWN}.48.2.bias", f"{DOWN}.32.0.weight", "base_model.sparsegen_fn"])
def test_a_copy_that_differs_is_refused(place, copied):
    _, tensors, save = copied
    key = next(key for key in tensors if key.startswith(place))
    with pytest.raises(ERRORS, match=r"sparsegen.*: differs from the tensor that it duplicates"):
        moe_lora_interop.read(save(tensors={**tensors, key: tensors[key] + 1}))


@pytest.mark.parametrize("layout", [None, "ld-mole"])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"enabled": False}, "sparsegen_cfg.enabled: found False, expected True"),
        ({"enabled": None}, "sparsegen_cfg.enabled: missing field"),
        ({"hidden_sizes": 11}, "temperature_0: shape .*expected 11"),
        ({"input_sizes": [32]}, r"sparsegen_cfg.input_sizes: found \[32\], the tensors say \[32, 48\]"),
        ({"eps": 0.1}, "sparsegen_cfg.eps: found 0.1"),
    ],
)
def test_the_switch_and_the_sizes_must_be_right(change, problem, layout, copied):
    config, _, save = copied
    cfg = {name: value for name, value in {**config["sparsegen_cfg"], **change}.items() if value is not None}
    with pytest.raises(ERRORS, match=problem):
        moe_lora_interop.read(save({**config, "sparsegen_cfg": cfg}), layout)


def test_a_module_without_the_network_of_its_width_is_refused(copied):
    _, tensors, save = copied
    without = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{DOWN}.48.")}
    with pytest.raises(ERRORS, match=r"layers\.1\.mlp\.down_proj temperature_0: missing tensor"):
        moe_lora_interop.read(save(tensors=without))


def test_a_network_for_a_width_that_no_module_has_is_left_out(copied, tmp_path):
    config, tensors, save = copied
    kept = {key: tensor for key, tensor in tensors.items() if "down_proj" not in key}
    targets = [name for name in config["target_modules"] if name != "down_proj"]
    adapter = moe_lora_interop.read(save({**config, "target_modules": targets}, kept))
    assert not any("down_proj" in module for module in adapter.modules)
    moe_lora_interop.write(adapter, tmp_path / "out", "ld-mole", duplicates=True)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["sparsegen_cfg"]["input_sizes"] == [32]
    assert_identical(moe_lora_interop.read(tmp_path / "out"), adapter)


def test_the_reader_for_the_softmax_says_where_to_go(copied):
    config, tensors, save = copied
    borrowed = {key: tensor for key, tensor in tensors.items() if "sparsegen" not in key}
    with pytest.raises(ERRORS, match=r"sparsegen_cfg: found \{.*the layout is ld-mole"):
        moe_lora_interop.read(save(config, borrowed), "loramoe")


def test_networks_that_training_moved_apart_are_kept_by_native_alone(tmp_path):
    peer = Peer(PEERS[1])
    model = mlj.load_adapter(mlj.load_base_model(peer.base), peer.directory)
    ids = jnp.asarray(peer.reference["input_ids"])
    gradients = nnx.grad(lambda model: model(ids).mean(), argnums=nnx.DiffState(0, mlj.MoeLoraParam))(model)
    nnx.Optimizer(model, optax.sgd(1.0), wrt=mlj.MoeLoraParam).update(model, gradients)
    mlj.save_pretrained(model, tmp_path / "native")
    trained = moe_lora_interop.read(tmp_path / "native")
    assert_identical(trained, mlj.to_adapter(model))
    with pytest.raises(ERRORS) as error:
        moe_lora_interop.write(trained, tmp_path / "theirs", "ld-mole")
    first, other = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    words = (
        f"{other} temperature_0: differs from that of {first}, and in this layout all modules with 32 inputs share it"
    )
    assert words in error.value.problems
