"""A corpus of hostile checkpoints, made when it is asked for: {case: (layout, {file name: content})}."""

import io
import json
import os
import pickle
import random
import zipfile

import numpy as np
import torch
from safetensors.numpy import load, save

from tools.fuzz import samples

CONFIG, WEIGHTS, BIN, NPZ = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapter_model.npz"


def tensor_file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


EMPTY = b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def entry(shape=(0,), dtype="F32", start=0, end=0):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def with_config(layout, **fields):
    """A sound adapter with other values in its config."""
    files = dict(samples()[layout])
    return files | {CONFIG: json.dumps(json.loads(files[CONFIG]) | fields).encode()}


def with_tensors(layout, tensors):
    return samples()[layout] | {WEIGHTS: save(tensors)}


def npz(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def npy(shape, data=b"", descr="<f4"):
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


class Command:
    """A pickle of this runs a command when it is loaded."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def torch_bin(tensors, **options):
    buffer = io.BytesIO()
    torch.save(tensors, buffer, **options)
    return buffer.getvalue()


def recompressed(content):
    """The same archive, its members compressed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    return npz(members, zipfile.ZIP_DEFLATED)


def key(name):
    return f"base_model.model.{name}.lora_A.weight"


def headers():
    """Safetensors files."""
    native = samples()["native"]
    for name, content in {
        "length 2^63": tensor_file(b"{}", length=2**63),
        "length 2^40": tensor_file(b"{}", length=2**40),
        "a million names": tensor_file({f"t{i}": entry() for i in range(1_000_000)}),
        "20000 names": tensor_file({key(f"model.layers.{i}.q_proj"): entry() for i in range(20_000)}),
        "duplicate names": tensor_file(
            b"{" + b",".join([b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'] * 50_000) + b"}"
        ),
        "a million values in an unknown field": tensor_file(
            b"{" + EMPTY[:-1] + b',"x":[' + b"[]," * 1_000_000 + b"[]]}}"
        ),
        "metadata of 15 MB": tensor_file({"__metadata__": {"a": "b" * 15_000_000}}),
        "deep": tensor_file(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
        "shape 2^40": tensor_file({key("a"): entry((2**40,), end=2**42)}, b"\0" * 16),
        "shape 0 x 2^62": tensor_file({key("a"): entry((0, 2**62))}),
        "shape 0 x 2^40 x 2^40": tensor_file({key("a"): entry((0, 2**40, 2**40))}),
        "negative shape": tensor_file({key("a"): entry((-1, 4), end=16)}, b"\0" * 16),
        "overlap": tensor_file({key("a"): entry((4,), end=16), key("b"): entry((4,), start=8, end=24)}, b"\0" * 24),
        "not UTF-8": tensor_file(b'{"\xff":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        "0-d": tensor_file({key("a"): entry((), end=4)}, b"\0" * 4),
        "a name of 5 MB": tensor_file({key("a" * 5_000_000): entry()}),
        "a layer number of 900 digits": tensor_file({key(f"model.layers.{'9' * 900}.q_proj"): entry()}),
        "a layer number of 5000 digits": tensor_file({key(f"model.layers.{'9' * 5000}.q_proj"): entry()}),
        "a path as a name": tensor_file({key("../../../etc/passwd"): entry()}),
        **{
            dtype: tensor_file({key("a"): entry((8,), dtype, end=8 * size)}, b"\0" * 8 * size)
            for dtype, size in (("I64", 8), ("U8", 1), ("F8_E4M3", 1), ("F8_E5M2", 1), ("BOOL", 1), ("F64", 8))
        },
    }.items():
        for layout, others in (("native", {CONFIG: native[CONFIG]}), ("lora", {CONFIG: samples()["lora"][CONFIG]})):
            yield f"header, {name}, {layout}", (layout, {**others, WEIGHTS: content})


def configs():
    """Configs."""
    bomb, native = "(a+)+b", samples()["native"][CONFIG]
    in_layers = {"layers_pattern": [bomb], "layers_to_transform": [0], "target_modules": ["c"]}
    for name, files in {
        "not UTF-8": {CONFIG: b'{"a": "\xff"}'},
        "deep": {CONFIG: b'{"peft_type": "MOE_LORA", "x": ' + b"[" * 900 + b"]" * 900 + b"}"},
        "deep below the parser's limit": {CONFIG: b'{"peft_type": "MOE_LORA", "x": ' + b"[" * 200 + b"]" * 200 + b"}"},
        "a million empty lists": {CONFIG: b'{"x": [' + b"[]," * 1_000_000 + b"[]]}"},
        "50000 duplicate keys": {CONFIG: b"{" + b'"a": 1, "b": 2,' * 50_000 + b'"a": 1}'},
        "a string of 10 MB": with_config("native", base_model_name_or_path="x" * 10_000_000),
        "1e999": {CONFIG: native.replace(b'"lora_alpha": 4', b'"lora_alpha": 1e999')},
        "integer of 4000 digits": {CONFIG: native.replace(b'"num_experts": 4', b'"num_experts": ' + b"9" * 4000)},
        "65536 experts": with_config("native", num_experts=65536, r=1),
        "2^40 experts": with_config("native", num_experts=2**40),
        "a path as base model": with_config("native", base_model_name_or_path="../../../etc/passwd"),
        "bomb in target_modules": with_config("native", target_modules=bomb) | evil_modules(),
        "bomb in exclude_modules": with_config("native", exclude_modules=f".*{bomb}") | evil_modules(),
        "bomb in rank_pattern": with_config("native", rank_pattern={bomb: 2}) | evil_modules(),
        "bomb in modules_to_save": with_config("native", modules_to_save=[bomb]) | evil_modules(),
        "bomb in layers_pattern": with_config("native", **in_layers) | evil_modules(),
        "many stars": with_config("native", target_modules=".*" * 30 + "b") | evil_modules(),
    }.items():
        yield f"config, {name}", ("native", samples()["native"] | files)
    for layout in ("moelora", "goat", "mola", "poly", "hydralora", "mixlora"):
        for field in ("r", "num_experts", "lora_nums", "expert_num", "top_k", "task_num", "n_tasks", "n_splits"):
            if field in json.loads(samples()[layout][CONFIG]):
                for value in (0, -1, 2**40, 2**63, 10**19):
                    yield f"config, {field} = {value}, {layout}", (layout, with_config(layout, **{field: value}))


def evil_modules():
    """Tensors whose names take for ever under a pattern that backtracks."""
    name = "a" * 400 + ".c"
    return {WEIGHTS: tensor_file({f"base_model.model.{name}.moe_lora_A": entry((4, 2, 8), end=256)}, b"\0" * 256)}


def archives(marker):
    """.npz and .bin files."""
    mole, ai = samples()["mole"], samples()["for-ai-molora"]
    names = [f"model.layers.0.q/{part}.npy" for part in ("lora_A", "lora_B", "router/router_weights/v/kernel")]
    zeros = npy((50_000_000,), bytes(200_000_000))
    for name, content in {
        "bomb": npz([(names[0], zeros)], zipfile.ZIP_DEFLATED),
        "shape 2^40": npz([(n, npy((2**40,), b"\0" * 16)) for n in names]),
        "shape 2^62": npz([(n, npy((2**62, 2**62), b"\0" * 16)) for n in names]),
        "negative shape": npz([(n, npy((-4,), b"\0" * 16)) for n in names]),
        "objects": npz([(n, npy((1,), pickle.dumps(Command(f"touch {marker}")), "|O")) for n in names]),
        "no arrays": npz([(n, b"no array") for n in names]),
        "one name twice": npz([("a.npy", npy((1,), bytes(4))), ("a", npy((1,), bytes(4)))]),
        "paths as names": npz([("../../../../tmp/x.npy", npy((1,), bytes(4)))]),
        "header of 60000 brackets": npz([(n, b"\x93NUMPY\x01\x00\x60\xea" + b"[" * 60_000) for n in names]),
        "no zip": b"PK\x03\x04" + bytes(100),
        "empty": b"",
    }.items():
        yield f"npz, {name}", ("for-ai-molora", {NPZ: content})
    state = {"base_model.model.a.lora_A.0.weight": torch.zeros(2, 2)}
    wide = {"base_model.model.a.lora_A.0.weight": torch.zeros(1).expand(2**16, 2**13)}
    views = torch.zeros(2**10, 2**10)
    for name, content in {
        "command": pickle.dumps(Command(f"touch {marker}")),
        "command among tensors": torch_bin({**state, "x": Command(f"touch {marker}")}),
        "stride 0": torch_bin(wide),
        "500 transposed views of one storage": torch_bin({f"{n}": views.T for n in range(500)}),
        "compressed bomb": recompressed(torch_bin({"a": torch.zeros(50_000_000)})),
        "meta tensor": torch_bin({"a": torch.zeros(4, device="meta")}),
        "sparse tensor": torch_bin({"a": torch.eye(4).to_sparse()}),
        "complex": torch_bin({"a": torch.zeros(4, dtype=torch.complex64)}),
        "int64": torch_bin({"a": torch.zeros(4, dtype=torch.int64)}),
        "a list": torch_bin([torch.zeros(4)]),
        "numbers as names": torch_bin({1: torch.zeros(4)}),
        "surrogate as name": torch_bin({"base_model.model.\ud800.lora_A.0.weight": torch.zeros(2, 2)}),
        "old format": torch_bin(state, _use_new_zipfile_serialization=False),
        "old format, cut": torch_bin(state, _use_new_zipfile_serialization=False)[:-8],
        "empty": b"",
        "random": random.Random(0).randbytes(5000),
    }.items():
        yield f"bin, {name}", ("mole", {CONFIG: mole[CONFIG], BIN: content})
    yield "npz, beside a config", ("for-ai-molora", {**ai, NPZ: npz([("a.npy", zeros[:64])])})


def folders(outside):
    """Layouts whose config names folders."""
    arrow, xlora = samples()["arrow"], samples()["xlora"]
    main = f"arrow_router/{CONFIG}"
    for name, listed in {
        "parent": ["../outside", "task_1", "task_2", "task_3"],
        "absolute": [str(outside), "task_1", "task_2", "task_3"],
        "one folder 4 times": ["task_0"] * 4,
        "one folder in 5000 spellings": ["task_0/." + "/." * n for n in range(200)],
        "itself": [".", "task_1", "task_2", "task_3"],
        "NUL": ["\0", "task_1", "task_2", "task_3"],
        "surrogate": ["\ud800", "task_1", "task_2", "task_3"],
        "name of 5000": ["x" * 5000, "task_1", "task_2", "task_3"],
        "numbers": [0, 1, 2, 3],
        "nested": [["task_0"]],
    }.items():
        config = json.loads(arrow[main])
        config["arrow_config"]["task_adapter_names"] = listed
        yield f"folders, {name}, arrow", ("arrow", {**arrow, main: json.dumps(config).encode()})
        if name != "parent":  # X-LoRA may
            adapters = {str(n): path for n, path in enumerate(listed)}
            yield f"folders, {name}, xlora", ("xlora", {**xlora, **with_config("xlora", adapters=adapters)})
    many = {str(n): f"x{n}/.." for n in range(100_000)}
    yield "folders, 100000, xlora", ("xlora", with_config("xlora", adapters=many))
    sound = load(arrow[f"task_0/{WEIGHTS}"])
    first = sorted(sound)[0]
    for name, tensors in {
        "NaN": {k: np.full_like(t, np.nan) for k, t in sound.items()},
        "infinite": {k: np.full_like(t, np.inf) for k, t in sound.items()},
        "zero-size": {k: t[:0] if k == first else t for k, t in sound.items()},
        "0-d": {k: t[0, 0, ...] if k == first else t for k, t in sound.items()},
        "ranks that differ in A and B": {k: np.zeros((5, 8), "f4") if "lora_A" in k else t for k, t in sound.items()},
    }.items():
        yield f"folders, {name}, arrow", ("arrow", {**arrow, f"task_0/{WEIGHTS}": save(tensors)})


def padding():
    """Small experts beside a large one, which padding would make as large."""
    arrow = dict(samples()["arrow"])
    names = [f"task_{n}" for n in range(300)]
    config = json.loads(arrow[f"arrow_router/{CONFIG}"])
    config["arrow_config"]["task_adapter_names"] = names
    files = {f"arrow_router/{CONFIG}": json.dumps(config).encode()}
    of_expert = json.loads(arrow[f"task_0/{CONFIG}"])
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    for n, name in enumerate(names):
        rank = 1000 if n == 0 else 1
        a, b = np.zeros((rank, 2000), np.float32), np.zeros((8, rank), np.float32)
        files[f"{name}/{WEIGHTS}"] = save({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b})
        files[f"{name}/{CONFIG}"] = json.dumps({**of_expert, "r": rank, "target_modules": ["q_proj"]}).encode()
    yield "padding, 300 experts of rank 1 beside one of 1000", ("arrow", files)


def layers():
    """A layer number that a list with an entry for each layer would be as long as."""
    tensors = load(samples()["lora"][WEIGHTS])
    renamed = {k.replace("layers.1.", "layers.999999999."): t for k, t in tensors.items()}
    yield "layers, 999999999, lora", ("lora", {CONFIG: samples()["lora"][CONFIG], WEIGHTS: save(renamed)})
    mola = {k.replace(".lora_A.weight", ".lora_A.0.weight"): t for k, t in renamed.items()}
    yield "layers, 999999999, mola", ("mola", {CONFIG: samples()["mola"][CONFIG], BIN: torch_bin(torch_of(mola))})


def torch_of(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def corpus(outside, marker):
    """Every case.

    Args:
        outside: a directory that no case may read.
        marker: a file that the commands in pickles would make.
    """
    found = {}
    for cases in (headers(), configs(), archives(marker), folders(outside), padding(), layers()):
        found |= dict(cases)
    return found
