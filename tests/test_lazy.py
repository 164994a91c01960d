"""Tensors still in a file: moved like arrays, read once, one at a time, and from the file that was opened."""

import dataclasses
import io
import os
import tracemalloc

import numpy as np
import pytest

import moe_lora_interop
from moe_lora_interop.checkpoint.read_write import opened
from moe_lora_interop.dialects.loramoe import LORAMOE
from moe_lora_interop.dialects.moe_peft import MOE_PEFT_LORAMOE
from moe_lora_interop.dialects.registry import register_dialect
from moe_lora_interop.disk import files, lazy
from moe_lora_interop.disk.files import WEIGHTS_NAME, TensorFile, write_tensors
from moe_lora_interop.errors import CheckpointError
from tests.adapters import assert_same_tensors, make_adapter, random_bits

# two layouts with a tensor per expert, in files that need not be read as a whole
STREAMED = [dataclasses.replace(d, name=f"{d.name}-st", weights=WEIGHTS_NAME) for d in (LORAMOE, MOE_PEFT_LORAMOE)]
DTYPES = ["float32", "bfloat16", "float16"]
FFN = {f"model.layers.{n}.mlp.up_proj": (5, 6) for n in range(4)}


@pytest.fixture
def layouts(monkeypatch):
    monkeypatch.setattr("moe_lora_interop.dialects.registry._registered", {})
    for dialect in STREAMED:
        register_dialect(dialect)
    return [d.name for d in STREAMED]


def ffn_adapter(shapes=FFN, **fields):
    return make_adapter(shapes, target_modules=["up_proj"], router_aux_loss="localized", **fields)


MOVES = {
    "itself": lambda t: t,
    "a_row": lambda t: t[1],
    "a_part_of_a_row": lambda t: t[1, :2],
    "a_value": lambda t: t[1, 2, 3],
    "columns": lambda t: t[:, :, 1:3],
    "a_new_axis": lambda t: t[None],
    "reshaped": lambda t: t.reshape((6, 4)),
    "transposed": lambda t: t.transpose([2, 0, 1]),
    "the_same_order": lambda t: t.transpose([0, 1, 2]),
    "a_row_of_it_transposed": lambda t: t.transpose([2, 0, 1])[3],
    "one_after_the_other": lambda t: t[1].transpose([1, 0])[1:].reshape((9,)),
    "nothing": lambda t: t[:, 3:],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MOVES)
def test_what_is_done_to_a_tensor_in_a_file_is_done_to_its_values(tmp_path, name, dtype):
    array = random_bits(np.random.default_rng(0), (2, 3, 4), dtype)
    write_tensors(tmp_path / "f", {"before": array[::-1], "t": array}, {})
    with TensorFile(tmp_path / "f") as file:
        tensors = file.tensors()
        for tensor in (tensors["t"], lazy.in_memory(array), lazy.stack(list(map(lazy.in_memory, array)), (2,), (3, 4))):
            moved, expected = MOVES[name](tensor), MOVES[name](array)
            assert isinstance(moved, lazy.Lazy)
            assert (moved.shape, moved.ndim, moved.dtype) == (expected.shape, expected.ndim, expected.dtype)
            assert (moved.size, moved.nbytes) == (expected.size, expected.nbytes)
            assert_same_tensors({"": np.asarray(moved)}, {"": expected})


@pytest.mark.parametrize("index", [(0,), (1,), (1, 2), (1, 2, 0)])
def test_stacking_pads_with_zeros(index):
    shapes = [(1, 3), (2, 2), (2, 3), (1, 1), (0, 3), (2, 1)]
    parts = [np.full(shape, n + 1.0, "float32") for n, shape in enumerate(shapes)]
    expected = np.array([np.pad(p, [(0, 2 - p.shape[0]), (0, 3 - p.shape[1])]) for p in parts]).reshape(2, 3, 2, 3)
    stacked = lazy.stack([lazy.in_memory(part) for part in parts], (2, 3), (2, 3))
    assert np.asarray(stacked).tolist() == expected.tolist()
    assert np.asarray(stacked[index]).tolist() == expected[index].tolist()
    assert lazy.stack(parts, (2, 3), (2, 3)).tolist() == expected.tolist()


def test_arrays_are_stacked_to_arrays():
    assert isinstance(lazy.stack([np.zeros(2), np.ones(2)], (2,), (2,)), np.ndarray)


def test_a_file_that_becomes_shorter_is_an_error_with_its_name(tmp_path):
    write_tensors(tmp_path / "f", {"a": np.ones(3, "float32"), "b": np.ones(10_000, "float32")}, {})
    with TensorFile(tmp_path / "f") as file:
        tensors = file.tensors()
        os.truncate(tmp_path / "f", os.path.getsize(tmp_path / "f") - 1)
        assert np.asarray(tensors["a"]).tolist() == [1, 1, 1]
        with pytest.raises(CheckpointError, match=f"{tmp_path}/f: found 39999 bytes.*expected 40000.*shorter"):
            np.asarray(tensors["b"])


def test_a_save_changes_nothing_for_those_who_have_opened_the_files(tmp_path):
    old = make_adapter(seed=0)
    moe_lora_interop.write(old, tmp_path)
    with opened(tmp_path) as adapter:
        moe_lora_interop.write(make_adapter(seed=1), tmp_path)
        assert_same_tensors({slot: np.asarray(t) for slot, t in adapter.tensors.items()}, old.tensors)


def test_a_source_that_breaks_during_the_conversion_leaves_nothing(tmp_path, layouts, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    moe_lora_interop.write(ffn_adapter({"model.layers.0.mlp.up_proj": (512, 512)}, r=32), source, layouts[0])

    def write(adapter, *args, **kwargs):
        os.truncate(source / WEIGHTS_NAME, os.path.getsize(source / WEIGHTS_NAME) - 1)
        moe_lora_interop.write(adapter, *args, **kwargs)

    monkeypatch.setattr("moe_lora_interop.checkpoint.read_write.write", write)
    with pytest.raises(CheckpointError, match=f"{source}/{WEIGHTS_NAME}: .*shorter"):
        moe_lora_interop.convert(source, target, layout=layouts[0])
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_directory_may_be_converted_into_itself(tmp_path, layouts):
    adapter = ffn_adapter()
    moe_lora_interop.write(adapter, tmp_path)
    moe_lora_interop.convert(tmp_path, tmp_path, to=layouts[0])
    moe_lora_interop.convert(tmp_path, tmp_path, layout=layouts[0])
    assert_same_tensors(moe_lora_interop.read(tmp_path).tensors, adapter.tensors)


class Counted(io.BufferedReader):
    """A file that counts the bytes of tensors that are read from it."""

    tensor_bytes: list[int]

    def readinto(self, buffer):
        self.tensor_bytes.append(memoryview(buffer).nbytes)
        return super().readinto(buffer)


@pytest.mark.parametrize(("source", "times"), [("native", 2), (STREAMED[0].name, 1)])
@pytest.mark.parametrize("target", ["native", STREAMED[1].name])
def test_every_byte_is_read_once_and_once_more_for_the_digest(tmp_path, layouts, monkeypatch, source, target, times):
    adapter, counted = ffn_adapter(), []
    moe_lora_interop.write(adapter, tmp_path / "source", source)
    monkeypatch.setattr(Counted, "tensor_bytes", counted, raising=False)
    monkeypatch.setattr(files, "opened", lambda path, what: Counted(io.FileIO(path)))
    loss = ["router_aux_loss"]  # what is counted is the tensors
    moe_lora_interop.convert(tmp_path / "source", tmp_path / "target", to=target, layout=source, allow_loss=loss)
    assert sum(counted) == times * sum(t.nbytes for t in adapter.tensors.values())


@pytest.mark.parametrize(("source", "target"), [("native", 0), (0, "native"), (0, 1)])
def test_a_conversion_has_a_few_tensors_in_memory_and_not_the_file(tmp_path, layouts, source, target):
    source, target = (layouts[n] if isinstance(n, int) else n for n in (source, target))
    adapter = ffn_adapter({f"model.layers.{n}.mlp.up_proj": (512, 512) for n in range(40)}, r=32, num_experts=4)
    moe_lora_interop.write(adapter, tmp_path / "source", source)
    largest, size = 4 * 32 * 512 * 4, os.path.getsize(tmp_path / "source" / WEIGHTS_NAME)
    del adapter
    tracemalloc.start()
    try:
        moe_lora_interop.convert(
            tmp_path / "source", tmp_path / "target", to=target, layout=source, allow_loss=["router_aux_loss"]
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 20_000_000
    assert peak < 3 * largest + 2_000_000  # the tensor, the part that is read, and what plans are made of


def test_a_copy_is_a_copy():
    array = np.zeros(3, "float32")
    np.array(lazy.in_memory(array))[0] = 1
    assert array.tolist() == [0, 0, 0]
