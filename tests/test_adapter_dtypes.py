"""Adapters are trained in fp32 whatever their file's dtype, and written in that dtype: bit by bit if untrained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_training import arrays, compiled_once, tiny_base, tiny_model, token_data  # noqa: F401

import moe_lora_interop
import moe_lora_jax as mlj
from moe_lora_interop import Adapter, CheckpointError
from moe_lora_jax.adapters.dtypes import for_file, for_training
from moe_lora_jax.train import TrainSettings, train
from tests.adapters import assert_same_tensors

DTYPES = ("float32", "bfloat16", "float16")
pytestmark = pytest.mark.usefixtures("compiled_once")


def stored(dtype, router_dtype="float32", **fields):
    """A random adapter for `tiny_base` in these dtypes."""
    adapter = mlj.to_adapter(tiny_model(**fields))
    dtypes = {slot: dtype if slot[1] in ("lora_A", "lora_B") else router_dtype for slot in adapter.tensors}
    return Adapter(adapter.config, {slot: t.astype(jnp.dtype(dtypes[slot])) for slot, t in adapter.tensors.items()})


def trained(model, steps, rate):
    """The model after steps of constant size, as Adam makes them."""
    state = nnx.state(model, mlj.MoeLoraParam)
    optimizer = optax.adam(rate)
    opt_state = optimizer.init(state)
    gradient = jax.tree.map(jnp.ones_like, state)
    for _ in range(steps):
        updates, opt_state = optimizer.update(gradient, opt_state, state)
        state = optax.apply_updates(state, updates)
    nnx.update(model, state)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("router_dtype", DTYPES)
def test_what_was_not_trained_is_written_bit_by_bit(tmp_path, dtype, router_dtype):
    moe_lora_interop.write(stored(dtype, router_dtype), tmp_path / "in")
    model = mlj.load_adapter(tiny_base(), tmp_path / "in")
    assert {value.dtype.name for value in arrays(model, mlj.MoeLoraParam).values()} == {"float32"}
    mlj.save_pretrained(model, tmp_path / "out")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "in" / weights).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_value_of_a_dtype_survives(dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits.view(jnp.dtype(dtype))
    values = values[~np.isnan(values.astype(np.float32))].reshape(1, 2, -1)
    adapter = stored(dtype)
    slot = next(s for s in adapter.tensors if s[1] == "lora_A")
    wide, before = for_training(Adapter(adapter.config, dict(adapter.tensors)), "float32")
    back = for_file({slot: values.astype(np.float32)}, before)[slot]
    assert wide.tensors[slot].dtype == np.float32 and back.tobytes() == values.tobytes()


def test_small_updates_of_a_bf16_adapter_do_not_vanish():
    adapter = stored("bfloat16")
    slot = ("model.layers.0.self_attn.q_proj", "lora_A")

    def moved(param_dtype):
        model = trained(mlj.load_adapter(tiny_base(), adapter, param_dtype=param_dtype), 100, 2e-5)
        found = arrays(model, mlj.MoeLoraParam)["model.layers.0.self_attn.q_proj.lora_a"]
        return (found.astype(np.float32) != adapter.tensors[slot].astype(np.float32)).mean()

    assert moved("float32") == 1.0
    assert moved(None) < 0.2  # what this is for


def test_train_continues_in_fp32_and_writes_the_files_dtype(tmp_path):
    adapter = stored("bfloat16")
    model = mlj.load_adapter(tiny_base(), adapter)
    before = arrays(model, mlj.MoeLoraParam)
    train(model, token_data(8), tmp_path, TrainSettings(steps=2, batch_size=4, learning_rate=1e-5))
    after = arrays(model, mlj.MoeLoraParam)
    assert all(value.dtype == np.float32 for value in after.values())
    moved = {name: (after[name] != before[name]).mean() for name in before if "lora" in name}
    assert min(moved.values()) > 0.9
    written = moe_lora_interop.read(tmp_path)
    assert {t.dtype.name for (_, role), t in written.tensors.items() if "lora" in role} == {"bfloat16"}
    assert_same_tensors(written.tensors, mlj.to_adapter(model).tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_asked_for_is_written(tmp_path, dtype):
    model = mlj.load_adapter(tiny_base(), stored("bfloat16", "float16"))
    mlj.save_pretrained(model, tmp_path, dtype=dtype)
    kinds = {
        (role in ("lora_A", "lora_B"), t.dtype.name) for (_, role), t in moe_lora_interop.read(tmp_path).tensors.items()
    }
    assert kinds == {(True, dtype), (False, "float32")}


def test_a_new_adapter_is_written_in_fp32(tmp_path):
    mlj.save_pretrained(tiny_model(), tmp_path)
    assert moe_lora_interop.read(tmp_path).dtype == np.float32


def test_values_too_large_for_the_dtype_are_refused_by_name(tmp_path):
    model = mlj.load_adapter(tiny_base(), stored("float16"))
    layer = model.model.layers[0].self_attn.q_proj
    layer.lora_a[...] = layer.lora_a[...].at[0, 0, 0].set(1e5)
    with pytest.raises(CheckpointError, match=r"q_proj lora_A: has values up to 1e\+05, too large for float16"):
        mlj.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    mlj.save_pretrained(model, tmp_path / "out", dtype="float32")


@pytest.mark.parametrize("dtype", ["int8", "float64", "float8_e4m3fn", "'bf16'"])
def test_other_dtypes_are_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"param_dtype: found {dtype}, expected"):
        mlj.load_adapter(tiny_base(), stored("float32"), param_dtype=dtype.strip("'"))
    with pytest.raises(ValueError, match=f"dtype: found {dtype}, expected"):
        mlj.save_pretrained(tiny_model(), tmp_path, dtype=dtype.strip("'"))


def test_taking_an_adapter_off_forgets_its_dtype(tmp_path):
    model = mlj.remove_moe_lora(mlj.load_adapter(tiny_base(), stored("bfloat16")))
    mlj.load_adapter(model, stored("float32"))
    assert mlj.to_adapter(model).dtype == np.float32


def test_a_bank_holds_fp32_and_writes_each_files_dtype(tmp_path):
    one, other = stored("bfloat16"), stored("float32", seed=3)
    bank = mlj.AdapterBank(tiny_base(), {"one": one, "other": other})
    assert {v.dtype.name for v in arrays(bank.model, mlj.MoeLoraParam).values()} == {"float32"}
    assert_same_tensors(bank.adapter("one").tensors, one.tensors)
    bank.replace("other", stored("float16", seed=4))  # another dtype needs no other program
    assert bank.adapter("other").dtype == np.float16
    bank.save_pretrained("one", tmp_path)
    assert_same_tensors(moe_lora_interop.read(tmp_path).tensors, one.tensors)
    assert bank.adapter("one", dtype="float32").dtype == np.float32
