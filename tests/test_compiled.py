"""What is read from compiled programs: a text summed by hand, and programs that libtpu really compiles for TPUs."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from moe_lora_interop.errors import ConfigError
from moe_lora_jax.compiled import compile_ahead, estimated_cycles, topology, usable_bytes
from moe_lora_jax.compiled.hlo import read_hlo
from moe_lora_jax.sharding import make_mesh

# A loop of 3 known trips around a loop whose u32 bound, 5, stands in its condition; two branches; a Pallas kernel.
TEXT = """HloModule jit_f, is_scheduled=true

FileNames
1 "/home/me/project/package/model.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=42 end_line=42 column=4 end_column=15}

StackFrames
1 {file_location_id=1 parent_frame_id=1}


%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %a = f32[8]{0:T(128)} add(%p, %p), backend_config={"window_config":{"estimated_cycles":"999999"}}
}

%inner_condition (t: (u32[], f32[8])) -> pred[] {
  %t.1 = (u32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%t.1), index=0
  %bound = u32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

%inner_body (t: (u32[], f32[8])) -> (u32[], f32[8]) {
  %t.2 = (u32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %x.2 = f32[8]{0:T(128)} get-tuple-element(%t.2), index=1
  %permute = f32[8]{0:T(128)} collective-permute(%x.2), backend_config={"estimated_cycles":"2"}
  ROOT %pair.2 = (u32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%t.2, %permute)
}

%outer_condition (t: (s32[], f32[8])) -> pred[] {
  %hundred = s32[]{:T(128)} constant(100)
  ROOT %less.3 = pred[]{:T(512)} compare(%hundred, %hundred), direction=LT
}

%outer_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t.3 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %inner = (u32[]{:T(128)}, f32[8]{0:T(128)}) while(%t.3), condition=%inner_condition, body=%inner_body
  %dot = f32[8]{0:T(128)} fusion(%inner), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/dot" stack_frame_id=1}, backend_config={"estimated_cycles":"100","x":[
    1, 2]}
  ROOT %pair.3 = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%t.3, %dot)
}

%cheap (p: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0:T(128)} copy(%p), backend_config={"estimated_cycles":"1"}
}

%dear (p: f32[8]) -> f32[8] {
  ROOT %d = f32[8]{0:T(128)} copy(%p), backend_config={"estimated_cycles":"7"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0), metadata={op_name="x"}
  %outer = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%x), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %either = f32[8]{0:T(128)} conditional(%x, %x, %x), branch_computations={%cheap, %dear}
  %splash = f32[8]{0:T(128)} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"estimated_cycles":"0"}
  ROOT %last = f32[8]{0:T(128)} call(%x), to_apply=%cheap
}
"""  # noqa: E501

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is the extra [plan]"
)


def test_cycles_are_summed_over_all_runs():
    cycles = estimated_cycles(TEXT)
    assert cycles.total == 3 * (5 * 2 + 100) + 7 + 1
    assert [(cost.name, cost.cycles, cost.runs) for cost in cycles.costs] == [
        ("dot", 300, 3),
        ("permute", 30, 15),
        ("d", 7, 1),
        ("c", 1, 1),
    ]
    assert (cycles.costs[0].op_name, cycles.costs[0].source) == ("jit(f)/dot", "project/package/model.py:42")
    assert cycles.costs[1].source == ""
    assert cycles.kernels == {"splash": 1}


def test_an_instruction_knows_its_parts():
    program = read_hlo(TEXT)
    (x, outer, *_) = program.computations[program.entry]
    assert (x.opcode, x.shape, x.op_name) == ("parameter", "f32[8]{0:T(128)}", "x")
    assert (outer.opcode, outer.computation("body")) == ("while", "outer_body")
    with pytest.raises(ValueError, match="found no ENTRY computation"):
        read_hlo("not HLO")


@needs_libtpu
def test_the_cycles_of_a_scan_are_trips_times_its_body():
    device = topology("v6e:1x1").devices[0]

    def cycles(function, *shapes):
        sharding = SingleDeviceSharding(device)
        arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
        return estimated_cycles(jax.jit(function).lower(*arguments).compile().as_text())

    def product(x, w):
        return jnp.tanh(x @ w)

    def chain(x, weights):
        return jax.lax.scan(lambda x, w: (product(x, w), None), x, weights)[0]

    n = 2048
    (alone,) = cycles(product, (n, n), (n, n)).costs
    bodies = []
    for trips in (3, 8):
        found = cycles(chain, (n, n), (trips, n, n))
        (inside,) = [cost for cost in found.costs if cost.op_name.endswith("dot_general")]
        assert inside.runs == trips and "tests/test_compiled.py:" in inside.source
        assert 0.7 < inside.cycles / trips / alone.cycles < 1.1  # x stays in fast memory, between the trips
        bodies.append(sum(cost.cycles for cost in found.costs if cost.runs == trips) / trips)
    assert bodies[0] == bodies[1]


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "chips", "kind", "gib"),
    [
        ("v5e:4x4", 16, "TPU v5 lite", 15.75),
        ("v6e:1x1", 1, "TPU v6 lite", 31.25),
        ("v6e:2x4", 8, "TPU v6 lite", 31.25),
        ("v5p:2x2x4", 16, "TPU v5", 95.74),
    ],
)
def test_topologies_are_those_of_the_words(name, chips, kind, gib, monkeypatch):
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    found = topology(name)
    assert (len(found.devices), {device.device_kind for device in found.devices}) == (chips, {kind})
    assert usable_bytes(found.devices[0]) == int(gib * 2**30)
    assert "TPU_SKIP_MDS_QUERY" not in os.environ and os.environ["TPU_WORKER_HOSTNAMES"] == "mine"


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:1x1", "v6e:1x1", "v5p:1x1x1"])
def test_a_chips_memory_is_what_its_compiler_calls_available(name):
    found = topology(name)
    huge = jax.ShapeDtypeStruct((200, 2**28), jnp.float32, sharding=SingleDeviceSharding(found.devices[0]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as error:
        jax.jit(lambda x: (x * 2, jnp.cumsum(x, 1))).lower(huge).compile()
    assert f"exceeds available HBM ({usable_bytes(found.devices[0]) / 2**30:.2f}G)" in str(error.value)


@needs_libtpu
@pytest.mark.parametrize(
    "name", ["v5e:4", "v5e", "h100:0", "h100:1x2x3", "h300:8", "v5p:2x2", "v5e:0x2", "v5e:2x-2", "v9:2x2", ""]
)
def test_an_unknown_topology_lists_what_works(name):
    with pytest.raises(ConfigError, match="no such topology") as error:
        topology(name)
    (problem,) = error.value.problems
    assert problem.startswith(f"topology: found {name!r}, expected one like v5e:1x1,")
    assert "v5p:2x2x4" in problem and problem.endswith("; h100:8; h200:8")


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ConfigError, match=r"libtpu: found none, .*pip install 'moe-lora-jax\[plan\]'"):
        topology("v5e:2x2")
    with pytest.raises(ConfigError, match=r"jax_cuda12_plugin: found none, .*pip install 'moe-lora-jax\[plan-gpu\]'"):
        topology("h100:8")


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="the GPU's compiler is the extra [plan-gpu]"
)
def test_a_program_for_gpus_is_compiled_and_measured():
    """x [4096, 512] bf16 on 8 GPUs, and its product with itself, gathered."""
    devices = topology("h100:8").devices
    assert len(devices) == 8 and usable_bytes(devices[0]) == int(0.75 * 84942979072)
    assert usable_bytes(topology("h200:2x8").devices[15]) == int(0.75 * 151397597184)
    mesh = make_mesh({"data": 8}, devices=devices)
    x = jax.ShapeDtypeStruct((4096, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data")))
    ahead = compile_ahead(jax.jit(lambda x: x @ x.T, out_shardings=x.sharding).lower(x))
    assert ahead.memory.arguments == 512 * 512 * 2 and ahead.cycles is None and ahead.refusal is None
    assert ahead.memory.total >= (512 * 512 + 4096 * 512 + 512 * 4096) * 2
    assert any(b.op_name.endswith("dot_general") and "test_compiled.py:" in b.source for b in ahead.memory.buffers)
