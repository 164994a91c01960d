"""Files: what safetensors itself reads back, strict reading of hostile ones, saves that happen whole or not at all."""

import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as st_numpy
from safetensors import safe_open

from moe_lora_interop import CheckpointError, detect, read, write
from moe_lora_interop.disk.atomic import replace_files
from moe_lora_interop.disk.files import existing_directory, read_header, read_json, read_tensors, write_tensors
from moe_lora_interop.disk.model_directory import WeightFiles
from tests.adapters import assert_same_tensors, random_bits
from tools.samples import sample

DTYPES = ["float32", "bfloat16", "float16"]


def read_with_safetensors(path):
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def raw_file(path, header, data=b"", length=None):
    """A safetensors file from its parts; `header` is JSON bytes or what to dump as JSON."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + data)
    return path


def entry(dtype="F32", shape=(1,), start=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


# --- writing --------------------------------------------------------------------------------------------------------


def test_written_files_are_read_by_safetensors(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"scalar": (), "vector": (3,), "matrix": (2, 3), "stack": (2, 3, 4), "empty": (0, 3), 'ünï.c"ode': (1,)}
    tensors = {f"{n}.{d}": random_bits(rng, s, d) for n, s in shapes.items() for d in DTYPES}
    metadata = {"format": "pt", "z": "ä", "a": 'quo"te'}
    write_tensors(tmp_path / "f", tensors, metadata)
    found, found_metadata = read_with_safetensors(tmp_path / "f")
    assert_same_tensors(found, tensors)
    assert found_metadata == metadata
    assert_same_tensors(read_tensors(tmp_path / "f"), tensors)
    infos, metadata_again = read_header(tmp_path / "f")
    assert metadata_again == metadata
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    assert {n: (names[i.dtype], i.shape) for n, i in infos.items()} == {
        n: (t.dtype.name, t.shape) for n, t in tensors.items()
    }


def test_data_start_aligned_for_every_dtype(tmp_path):
    tensors = {"a": np.ones(1, "float16"), "b": np.ones(1, "float32"), "abcde": np.ones((3,), ml_dtypes.bfloat16)}
    write_tensors(tmp_path / "f", tensors, {"k": "v" * 5})
    raw = (tmp_path / "f").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    assert length % 8 == 0
    assert all((8 + length + h["data_offsets"][0]) % tensors[n].itemsize == 0 for n, h in header.items())


def test_files_that_safetensors_writes_are_read(tmp_path):
    tensors = {"a": np.arange(6, dtype="float32").reshape(2, 3), "b": np.ones(3, ml_dtypes.bfloat16)}
    st_numpy.save_file(tensors, tmp_path / "f", {"format": "pt"})
    assert_same_tensors(read_tensors(tmp_path / "f"), tensors)
    assert read_header(tmp_path / "f")[1] == {"format": "pt"}


def test_a_file_without_metadata_has_empty_metadata(tmp_path):
    raw_file(tmp_path / "f", {"a": entry()}, b"\0" * 4)
    assert read_header(tmp_path / "f")[1] == {}


def test_the_same_content_gives_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.standard_normal((i + 1, 2)).astype(DTYPES[i % 3]) for i in range(9)}
    metadata = {str(i): "v" for i in range(9)}
    write_tensors(tmp_path / "a", tensors, metadata)
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


MATRIX = np.arange(24, dtype="float32").reshape(4, 6)
VIEWS = {
    "transposed": MATRIX.T,
    "every_second_row": MATRIX[::2],
    "every_second_column": MATRIX[:, ::2],
    "reversed": MATRIX[::-1],
    "inner_block": MATRIX[1:3, 2:4],
    "broadcast": np.broadcast_to(MATRIX[:1], (5, 6)),
    "fortran": np.asfortranarray(MATRIX),
    "swapped_axes": MATRIX.reshape(2, 2, 6).transpose(2, 0, 1),
    "bfloat16": MATRIX.astype(ml_dtypes.bfloat16).T[::2],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_written_with_the_values_they_show(tmp_path, name):
    write_tensors(tmp_path / "f", {"t": VIEWS[name]}, {})
    found = read_with_safetensors(tmp_path / "f")[0]["t"]
    assert found.tolist() == VIEWS[name].tolist()


def test_big_endian_arrays_keep_their_values(tmp_path):
    write_tensors(tmp_path / "f", {"t": MATRIX.astype(">f4"), "h": MATRIX.astype(">f2")}, {})
    found, _ = read_with_safetensors(tmp_path / "f")
    assert found["t"].tolist() == MATRIX.tolist() and found["h"].tolist() == MATRIX.tolist()


def test_writing_changes_no_argument(tmp_path):
    tensors, metadata = {"b": MATRIX.T, "a": MATRIX}, {"z": "1", "a": "2"}
    values = {n: t.tolist() for n, t in tensors.items()}
    write_tensors(tmp_path / "f", tensors, metadata)
    assert list(tensors) == ["b", "a"] and list(metadata) == ["z", "a"]
    assert {n: t.tolist() for n, t in tensors.items()} == values


# --- reading what is damaged or hostile -----------------------------------------------------------------------------


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    write_tensors(tmp_path / "f", {"a": np.ones((2, 3), "float32"), "b": np.ones(3, "float16")}, {"format": "pt"})
    whole = (tmp_path / "f").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "f").write_bytes(whole[:size])
        for reader in (read_tensors, read_header):
            with pytest.raises(CheckpointError, match="unreadable safetensors file"):
                reader(tmp_path / "f")


def test_bytes_after_the_data_are_refused(tmp_path):
    write_tensors(tmp_path / "f", {"a": np.ones(3, "float32")}, {})
    with (tmp_path / "f").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / "f")


TWICE = b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
HOSTILE = {
    "length_of_2_to_64": dict(header=b"{}", length=2**64 - 1),
    "length_beyond_the_file": dict(header=b"{}", length=1000),
    "length_zero": dict(header=b"", length=0),
    "not_json": dict(header=b"{a}"),
    "a_list": dict(header=b"[]"),
    "not_utf8": dict(header=b'{"\xff":' + json.dumps(entry()).encode() + b"}", data=b"\0" * 4),
    "nan": dict(header=b'{"a":NaN}'),
    "nan_as_a_size": dict(header=b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', data=b"\0" * 4),
    "deep_json": dict(header=b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "duplicate_names": dict(header=TWICE, data=b"\0" * 4),
    "overlapping": dict(header={"a": entry(), "b": entry(start=2, end=6)}, data=b"\0" * 6),
    "shared_data": dict(header={"a": entry(), "b": entry()}, data=b"\0" * 4),
    "a_hole": dict(header={"a": entry(), "b": entry(start=8, end=12)}, data=b"\0" * 12),
    "data_behind_the_end": dict(header={"a": entry(start=0, end=8, shape=(2,))}, data=b"\0" * 4),
    "offsets_reversed": dict(header={"a": entry(start=4, end=0)}, data=b"\0" * 4),
    "negative_offsets": dict(header={"a": entry(start=-4, end=0)}, data=b"\0" * 4),
    "shape_larger_than_data": dict(header={"a": entry(shape=(2,))}, data=b"\0" * 4),
    "shape_overflows": dict(header={"a": entry(shape=(2**62, 8))}, data=b"\0" * 4),
    "negative_shape": dict(header={"a": entry(shape=(-1,))}, data=b"\0" * 4),
    "unknown_dtype": dict(header={"a": entry("F33")}, data=b"\0" * 4),
    "no_dtype": dict(header={"a": {"shape": [1], "data_offsets": [0, 4]}}, data=b"\0" * 4),
    "metadata_not_strings": dict(header={"__metadata__": {"a": 1}, "a": entry()}, data=b"\0" * 4),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_a_checkpoint_error(tmp_path, name):
    path = raw_file(tmp_path / "f", **HOSTILE[name])
    with pytest.raises(CheckpointError) as error:
        read_tensors(path)
    assert str(path) in str(error.value)


FOREIGN = [("I64", 8), ("I32", 4), ("I8", 1), ("U8", 1), ("BOOL", 1), ("F64", 8), ("F8_E4M3", 1), ("F8_E5M2", 1)]


@pytest.mark.parametrize(("dtype", "size"), FOREIGN)
def test_dtypes_that_adapters_do_not_have_are_refused_by_name(tmp_path, dtype, size):
    header = {"good": entry(end=4), "bad": entry(dtype, (2,), 4, 4 + 2 * size), "zbad": entry(dtype, (0,), 4, 4)}
    path = raw_file(tmp_path / "f", header, b"\0" * (4 + 2 * size))
    with pytest.raises(CheckpointError) as error:
        read_tensors(path)
    assert [p.split(",")[0] for p in sorted(error.value.problems)] == [f"bad: dtype {dtype}", f"zbad: dtype {dtype}"]
    assert all("expected one of F32, BF16, F16" in p for p in error.value.problems)


@pytest.mark.parametrize("reader", [read_tensors, read_header, read_json])
def test_a_missing_file_and_a_folder_instead_of_a_file(tmp_path, reader):
    with pytest.raises(CheckpointError, match="nowhere: missing file"):
        reader(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        reader(tmp_path)


BAD_JSON = {
    "empty": b"",
    "cut": b'{"a": 1',
    "duplicate_keys": b'{"a": 1, "b": 2, "a": 1}',
    "nested_duplicate_keys": b'{"b": {"a": 1, "a": 2}}',
    "nan": b'{"a": NaN}',
    "infinity": b'{"a": [-Infinity]}',
    "a_list": b"[1]",
    "a_string": b'"a"',
    "not_utf8": b'{"a": "\xff"}',
    "utf16": '{"a": 1}'.encode("utf-16"),
    "deep": b'{"a":' * 50_000,
    "huge_integer": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_a_checkpoint_error(tmp_path, name):
    (tmp_path / "c.json").write_bytes(BAD_JSON[name])
    with pytest.raises(CheckpointError, match="unreadable JSON") as error:
        read_json(tmp_path / "c.json")
    assert str(tmp_path / "c.json") in error.value.problems[0]


def test_json_objects_are_read(tmp_path):
    (tmp_path / "c.json").write_text('{"ä": [1, 2.5, null, {"b": true}]}', "utf-8")
    assert read_json(tmp_path / "c.json") == {"ä": [1, 2.5, None, {"b": True}]}


def test_existing_directory_says_what_it_found(tmp_path):
    (tmp_path / "file").touch()
    assert existing_directory(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="file: found a file, expected a directory"):
        existing_directory(tmp_path / "file")
    for path in (tmp_path / "nowhere", tmp_path / "file" / "below", tmp_path / "nul\0"):
        with pytest.raises(CheckpointError, match="expected a directory"):
            existing_directory(path)


# --- saving whole or not at all -------------------------------------------------------------------------------------


def writer(text):
    return lambda path: path.write_text(text)


def contents(directory):
    return {p.name: p.read_text() for p in directory.iterdir()}


OLD = {"a": "old a", "b": "old b", "c": "old c"}


@pytest.fixture
def saved(tmp_path):
    replace_files(tmp_path / "out", {n: writer(t) for n, t in OLD.items()})
    return tmp_path / "out"


def test_files_are_replaced_and_others_left(saved):
    (saved / "other").write_text("mine")
    replace_files(saved, {"a": writer("new a"), "d": writer("new d")})
    assert contents(saved) == {**OLD, "a": "new a", "d": "new d", "other": "mine"}


def test_missing_parents_are_created(tmp_path):
    replace_files(tmp_path / "x" / "y", {"a": writer("1")})
    assert contents(tmp_path / "x" / "y") == {"a": "1"}


def test_a_full_disk_leaves_the_old_files(saved):
    def full(path):
        path.write_text("half a fi")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="could not save.*\n.*No space left"):
        replace_files(saved, {"a": writer("new a"), "b": full})
    assert contents(saved) == OLD


def test_an_interrupted_save_leaves_the_old_files(saved):
    def interrupted(path):
        path.write_text("half a fi")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_files(saved, {"a": writer("new a"), "b": interrupted})
    assert contents(saved) == OLD


def fail_at(monkeypatch, name, call):
    """Makes the `call`-th call of os.`name` fail once."""
    real, calls = getattr(os, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)
    return calls


@pytest.mark.parametrize(("name", "call"), [("fsync", 1), ("fsync", 3), ("replace", 1), ("replace", 2), ("replace", 3)])
def test_a_failure_at_any_step_leaves_all_old_files(saved, monkeypatch, name, call):
    calls = fail_at(monkeypatch, name, call)
    with pytest.raises(CheckpointError, match="could not save.*\n.*Input/output error"):
        replace_files(saved, {n: writer(f"new {n}") for n in OLD})
    monkeypatch.undo()
    assert len(calls) >= call
    assert contents(saved) == OLD


def test_a_failure_at_any_rename_of_a_first_save_leaves_nothing(tmp_path, monkeypatch):
    fail_at(monkeypatch, "replace", 2)
    with pytest.raises(CheckpointError, match="could not save"):
        replace_files(tmp_path, {n: writer(f"new {n}") for n in OLD})
    monkeypatch.undo()
    assert contents(tmp_path) == {}


def test_a_folder_in_a_files_place_leaves_the_old_files(saved):
    (saved / "b").unlink()
    (saved / "b").mkdir()
    with pytest.raises(CheckpointError, match="could not save"):
        replace_files(saved, {n: writer(f"new {n}") for n in OLD})
    (saved / "b").rmdir()
    assert contents(saved) == {"a": "old a", "c": "old c"}


def test_a_file_in_the_directorys_place_is_refused_and_kept(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="could not save"):
        replace_files(tmp_path / "out", {"a": writer("1")})
    assert contents(tmp_path) == {"out": "mine"}


# --- files that stand for others --------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"])
def test_a_git_lfs_pointer_says_what_it_is(tmp_path, name):
    write(sample("lora"), tmp_path, "lora")
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(
        CheckpointError, match=rf"{name}: found a Git LFS pointer, not the file itself: run git lfs pull"
    ):
        read(tmp_path)


def test_a_git_lfs_pointer_in_a_models_place(tmp_path):
    (tmp_path / "model.safetensors").write_text(POINTER)
    with pytest.raises(CheckpointError, match="model.safetensors: found a Git LFS pointer"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (
            ["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"],
            "adapter_model-00001-of-00002.safetensors and 1 more: these are parts (shards) of adapter_model.",
        ),
        (
            ["adapter_model-00001-of-00001.bin"],
            "adapter_model-00001-of-00001.bin: these are parts (shards) of adapter_model.bin",
        ),
        (
            ["adapter_model.safetensors.index.json"],
            "adapter_model.safetensors.index.json: these are parts (shards) of adapter_model.safetensors",
        ),
    ],
)
def test_an_adapter_in_shards_says_what_it_is(tmp_path, names, found):
    write(sample("lora"), tmp_path, "lora")
    (tmp_path / "adapter_model.safetensors").unlink()
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    for call in (read, detect):
        with pytest.raises(CheckpointError) as error:
            call(tmp_path)
        assert sum(found in problem and "join them first" in problem for problem in error.value.problems) == 1


def test_an_expert_in_shards_says_so_too(tmp_path):
    write(sample("arrow"), tmp_path, "arrow")
    weights = tmp_path / "task_0" / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match=r"task_0.*missing file\n.*found adapter_model-00001-of-00002"):
        read(tmp_path, "arrow")
