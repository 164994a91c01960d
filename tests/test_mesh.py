"""A mesh of 8 devices against one: same losses, same adapter, same text; and what the devices tell each other."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from mesh_base import adapted, write_base

import moe_lora_jax as mlj
from moe_lora_interop.errors import ConfigError
from moe_lora_jax.cli.train import train
from moe_lora_jax.cli.train_flags import MachineFlags
from moe_lora_jax.processes import connect
from moe_lora_jax.sharding import RULES, mesh_of, shardings

ARRAY = re.compile(r"\w+\[[\d,]*\]")
WORKER = Path(__file__).parent / "mesh_worker.py"
MESHES = (
    "mixed, scan, packed",
    "data",
    "mixed",
    "fsdp",
    "tensor",
    "expert",
    "data fsdp",
    "fsdp tensor",
    "fsdp expert",
    "data fsdp, gemma",
    "mixed, ffn",
    "mixed, model",
)
ONE = {f"one, {variant}" for variant in ("", "scan, packed", "ffn", "model", "gemma")}
TOKENS = {"f32[192,", "f32[8,24,"}  # activations of a micro-batch, flat and not
TABLE = {"f32[72,32]", "f32[36,32]"}
GATHERED = {  # base weights, as wide as a device that has its share of "tensor" needs them
    "fsdp": {"32,32", "32,16", "32,48", "48,32", "32,72"},
    "mixed": {"32,16", "16,32", "32,8", "8,32", "32,24", "24,32", "32,36"},
}
GATHERED |= {"data fsdp": GATHERED["fsdp"], "fsdp expert": GATHERED["fsdp"], "fsdp tensor": GATHERED["mixed"]}
# into how many parts a mesh cuts the base's weights and the table, A and B, and the routers' kernels
PARTS = {
    "data": (1, 1, {1}),
    "fsdp": (8, 8, {8}),
    "data fsdp": (4, 4, {4}),
    "tensor": (2, 2, {1, 2}),  # whole where the layer's input is
    "fsdp tensor": (8, 8, {4, 8}),
    "mixed": (4, 4, {2, 4}),
    "expert": (1, 4, {1}),
    "fsdp expert": (2, 8, {2}),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, request) -> dict:
    """{mesh: what the worker reports}; a short run has the first two meshes, and a full one all."""
    chosen = MESHES if request.config.getoption("--full") else MESHES[:2]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, WORKER, tmp_path_factory.mktemp("mesh"), *chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Involuntary full rematerialization" not in done.stderr
    return json.loads(done.stdout)


def test_ten_steps_are_those_of_one_device(found, measured):
    for name, mesh in found.items():
        one = found[f"one, {name.partition(', ')[2]}"]
        assert one["losses"][0] - min(one["losses"]) > 1
        losses = np.abs(np.subtract(mesh["losses"], one["losses"])).max()
        assert mesh["adapter"].keys() == one["adapter"].keys()
        weights = max(np.abs(np.subtract(mesh["adapter"][n], one["adapter"][n])).max() for n in one["adapter"])
        if name not in ONE:
            measured(f"losses on the mesh {name}", losses)
            measured(f"adapter on the mesh {name}", weights)
        assert losses < 1e-5 and weights < 1e-4, (name, losses, weights)
        assert mesh["loss after"] == pytest.approx(one["loss after"], abs=2e-5)
        assert mesh["generated"] == one["generated"]


def test_weights_experts_and_moments_are_spread_by_the_rules(found):
    for name, mesh in found.items():
        if name in ONE:
            continue
        weights, factors, routers = PARTS[name.partition(", ")[0]]
        for path, parts in {**mesh["parts"], **mesh["AdamW's parts"]}.items():
            if "lora_a" in path or "lora_b" in path:
                expected = {factors}
            elif "router" in path:
                expected = routers
            else:
                expected = {1} if "norm" in path else {weights}
            assert parts in expected, (name, path, parts)
        moments = [path for path in mesh["AdamW's parts"] if "lora_a" in path or "lora_b" in path]
        assert len(moments) >= 2 * 2 * 3 and "model.embed_tokens.embedding.value" in mesh["parts"]


def test_only_what_fsdp_spreads_is_gathered(found, measured):
    """A device sees base weights other than its own when "fsdp" spreads them and they are due; the embedding's table
    and others' activations never."""
    counts: Counter[str] = Counter()
    for name, mesh in found.items():
        gathered = set()
        for collective, count in mesh["collectives"].items():
            kind, _, result = collective.partition(" ")
            counts[f"{kind} in the program of the mesh {name}"] += count
            if kind == "all-gather":
                gathered |= set(ARRAY.findall(result))
        assert not any(array.startswith(tuple(TOKENS)) for array in gathered), (name, gathered)
        assert not gathered & TABLE, (name, gathered)
        shapes = {array.partition("[")[2].strip("]") for array in gathered}
        base = {"32,32", "32,16", "32,48", "48,32", "32,72"}
        allowed = GATHERED.get(name.partition(", ")[0], set())
        assert not (shapes & base) - allowed, (name, gathered)
        if name == "fsdp":
            assert allowed - {"48,32"} <= shapes
        if name == "data":
            assert not gathered
        assert name in ONE or any("all-reduce" in c for c in mesh["collectives"])
    for kind, count in counts.items():
        measured(kind, count)


def test_a_mesh_that_does_not_fit_is_refused_in_words():
    with pytest.raises(ConfigError, match=r"found {'data': 3}, expected numbers whose product is that of devices, 1"):
        mlj.make_mesh({"data": 3})
    with pytest.raises(ConfigError, match=r"found 'batch', expected some of data, fsdp, tensor, expert"):
        mlj.make_mesh({"batch": 1})
    mesh = jax.sharding.AbstractMesh((2,), ("fsdp",), axis_types=(AxisType.Auto,))
    rules = ((r"a\.kernel", PartitionSpec(None, "tensor")), (r"a\.bias", PartitionSpec("fsdp", "tensor")), *RULES)
    with pytest.raises(ConfigError, match=r"a.bias: found shape \(3,\), expected as many axes as in its rule"):
        shardings({"a.kernel": (2, 3), "a.bias": (3,)}, mesh, rules)


def test_axes_that_do_not_divide_are_all_named():
    """On a mesh of shapes alone: no device is asked."""
    mesh = jax.sharding.AbstractMesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    shapes = {"model.embed_tokens.embedding": (63, 33), "x.q_proj.kernel": (32, 16), "x.q_proj.bias": (6,)}
    with pytest.raises(ConfigError) as error:
        shardings(shapes, mesh, RULES)
    assert [p.split(" ")[0] for p in error.value.problems] == ["model.embed_tokens.embedding:"] * 2 + ["x.q_proj.bias:"]
    assert "expected a multiple of tensor = 4" in str(error.value)
    fine = shardings({"x.q_proj.kernel": (32, 16), "x.norm.weight": (5,)}, mesh, RULES)
    assert [sharding.spec for sharding in fine.values()] == [PartitionSpec("fsdp", "tensor"), PartitionSpec()]


def test_a_mesh_of_one_device_is_a_mesh(tmp_path):
    model = adapted(write_base(tmp_path / "base"), {"data": 1})
    assert mesh_of(model).axis_names == ("data",)
    assert mlj.generate(model, np.ones((1, 3), int), max_new_tokens=2).shape == (1, 5)
    assert mesh_of(adapted(tmp_path / "base", None)) is None


def test_wrong_flags_are_refused_in_words(tmp_path):
    with pytest.raises(ConfigError, match=r"mesh: found 'data', expected name=size, each name once"):
        train(tmp_path, tmp_path, tmp_path / "out", machine=MachineFlags(mesh=("data", "fsdp=1")))
    for given in ({"num_processes": 2}, {"coordinator": "x:1"}, {"coordinator": "auto", "process_id": 0}):
        with pytest.raises(ConfigError, match="expected none of them, coordinator auto, or coordinator, num_processes"):
            connect(**{"coordinator": None, "num_processes": None, "process_id": None, **given})
