"""`moe-lora plan`: what it says is what compiling the step of `train` says, and what can be summed by hand."""

import json
import math
from importlib.metadata import EntryPoint

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from huggingface_hub import constants
from jax.sharding import NamedSharding

import moe_lora_jax as mlj
from moe_lora_interop.cli import main as cli
from moe_lora_interop.disk.hub import config_directory
from moe_lora_interop.errors import ConfigError
from moe_lora_jax.compiled import estimated_cycles, topology
from moe_lora_jax.compiled.hlo import read_hlo
from moe_lora_jax.compiled.memory import read_memory
from moe_lora_jax.models import CausalLM, DecoderConfig
from moe_lora_jax.sharding import row_sharding
from moe_lora_jax.train import (
    Batch,
    TrainingError,
    TrainSettings,
    adamw,
    lora_of,
    make_train_step,
    plan,
    split_model,
    warmup_cosine,
)
from tests.test_compiled import TEXT, needs_libtpu

# every axis of every part on 4 chips is a multiple of 128, so that no chip pads it
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
WORDS = "--topology v5e:2x2 --mesh fsdp=4 --seq 128 --batch 16 --gradient-accumulation 2 --scan-layers"
WORDS += " --num-experts 4 --r 8 --top-k 2 --target-modules q_proj down_proj"
MIXTURE = mlj.MoeLoraConfig(r=8, num_experts=4, top_k=2, target_modules=["q_proj", "down_proj"])


@pytest.fixture(autouse=True)
def verb(monkeypatch):
    """The verb, whether or not this installation already lists it."""
    point = EntryPoint("plan", "moe_lora_jax.cli.plan:plan [plan]", cli.GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda group: [point])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(json.dumps(TINY))
    return file


@pytest.fixture(scope="module")
def told(config):
    """What the verb prints, once for all tests that read it."""
    with pytest.MonkeyPatch.context() as patch:
        point = EntryPoint("plan", "moe_lora_jax.cli.plan:plan [plan]", cli.GROUP)
        patch.setattr(cli, "entry_points", lambda group: [point])
        printed = []
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        code = cli.main(["plan", "--config", str(config), *WORDS.split(), "--compare", "lora", "--json"])
    assert code == 0
    return json.loads(printed[0])


def real_states(fields: mlj.MoeLoraConfig):
    """The states of a model with all its arrays, as `train` makes them, here on one device."""
    model = CausalLM(DecoderConfig.from_hf(TINY), rngs=nnx.Rngs(0))
    model.model.scan_layers, model.model.remat = True, "full"
    mlj.apply_moe_lora(model, fields, rngs=nnx.Rngs(0))
    model.train()
    optimizer = adamw(warmup_cosine(2e-4, 0, 10), weight_decay=0.0, max_grad_norm=1.0)
    return model, optimizer, *split_model(model, nnx.All(mlj.MoeLoraParam), optimizer)


@needs_libtpu
def test_the_numbers_are_those_of_the_real_step(told):
    """The arrays' own shapes, laid on the chips like the states of shapes, through the step that trains."""
    mesh = mlj.make_mesh({"fsdp": 4}, devices=topology("v5e:2x2").devices)
    shapes = mlj.abstract_base_model(TINY, scan_layers=True, mesh=mesh)
    mlj.apply_moe_lora(shapes, MIXTURE, rngs=nnx.Rngs(0))
    shapes.train()
    model, optimizer, graphdef, state, frozen = real_states(MIXTURE)
    _, *laid = split_model(shapes, nnx.All(mlj.MoeLoraParam), optimizer)
    model.model.mesh = mesh
    graphdef = nnx.graphdef(model)

    def lay(real, like):
        assert (real.shape, real.dtype) == (like.shape, like.dtype) and isinstance(like.sharding, NamedSharding)
        return jax.ShapeDtypeStruct(real.shape, real.dtype, sharding=like.sharding)

    state, frozen = jax.tree.map(lay, (state, frozen), tuple(laid))
    step = make_train_step(graphdef, optimizer, MIXTURE, state)
    rows = [jax.ShapeDtypeStruct((2, 16, 128), d, sharding=row_sharding(mesh, 1)) for d in (jnp.int32, jnp.int32, bool)]
    compiled = step.lower(state, frozen, Batch(*rows)).compile()
    assert told["cycles"] == estimated_cycles(compiled.as_text()).total
    memory = compiled.memory_analysis()
    assert told["arguments"] == memory.argument_size_in_bytes
    assert told["program"] == memory.generated_code_size_in_bytes
    by_hand = sum(_padded(leaf) for leaf in jax.tree.leaves((state, frozen, rows)))
    assert told["arguments"] == by_hand


def _padded(leaf) -> int:
    """Bytes of a leaf on one chip; the optimizer's counts fill 512."""
    shape = leaf.sharding.shard_shape(leaf.shape)
    return max(math.prod(shape) * leaf.dtype.itemsize, 512)


@needs_libtpu
def test_lora_of_as_many_numbers_is_cheaper(told):
    lora = told["lora"]
    assert lora["fits"] and 1 < told["cycles"] / lora["cycles"] < 3
    routers = 3 * 2 * (512 + 1024) * 4 * 4  # two layers, q's and down's, with two moments each, in fp32
    assert told["arguments"] - lora["arguments"] == routers / 4


@needs_libtpu
def test_what_lies_beside_the_step_is_what_it_copies(told):
    """Stacked layers and the adapter lie there twice; embeddings, head and the last norm do not."""
    layer = 4 * 512 * 512 + 3 * 512 * 1024
    kernels, norms = 2 * layer * 2 // 4, 2 * 2 * 512 * 2
    model, _, _, state, _ = real_states(MIXTURE)
    adapter = told["kept_beside"] - kernels - norms
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, mlj.MoeLoraParam)))
    assert whole / 4 <= adapter <= whole
    assert told["needed_bytes"] == told["step_total"] + told["kept_beside"] + told["program"] and told["fits"]


def planned(capsys, *words) -> tuple[int, str, str]:
    code = cli.main(["plan", *map(str, words)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@needs_libtpu
def test_what_does_not_fit_says_by_how_much_and_of_what(tmp_path, capsys):
    wide = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 4, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **wide}))
    words = f"--model {tmp_path} --topology v6e:1x1 --seq 128 --batch 1 --num-experts 2 --target-modules q_proj".split()
    code, out, _ = planned(capsys, *words, "--json")
    told = json.loads(out)
    assert (code, told["fits"], told["cycles"]) == (1, False, None)
    total = f"({told['step_total'] / 2**30:.2f}G) exceeds available HBM (31.25G)"
    assert "RESOURCE_EXHAUSTED" in told["refusal"] and total in told["refusal"]
    largest = told["largest_buffers"][0]
    assert largest["bytes"] == 16384 * 65536 * 4 and "_proj']['kernel']" in largest["op_name"]
    code, out, _ = planned(capsys, *words)
    assert code == 1 and "does not fit: " in out and " too much (" in out and "4.00 GiB  f32[" in out
    assert "base model model.layers.mlp." in out


USUAL = "--topology v5e:2x2 --seq 128 --batch 8".split()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["nowhere/at/all", *USUAL],
            "nowhere/at/all: missing file",
        ),
        (["some/model", *USUAL], "some/model: found no such directory\n  - on the Hugging Face Hub: "),
        ([None, "--topology", "v5e:2x2", "--seq", 1], "seq: found 1, expected an integer >= 2"),
        ([None, *USUAL, "--mesh", "fsdp"], "mesh: found 'fsdp', expected name=size"),
        ([None, *USUAL, "--batch-size", 0], "batch_size: found 0"),
    ],
)
def test_wrong_words_are_refused(config, capsys, words, problem):
    code, out, err = planned(capsys, "--model", words[0] or config, *words[1:])
    assert (code, out) == (2, "") and problem in err


@needs_libtpu
@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--topology", "v5e:2", "--seq", 8], "topology: found 'v5e:2', expected one like v5e:1x1"),
        ([*USUAL, "--mesh", "fsdp=8"], "expected numbers whose product is that of devices, 4"),
        ([*USUAL, "--batch-size", 6], "batch_size: found 6, expected a multiple of 4"),
        ([*USUAL, "--target-modules", "nothing"], "target_modules"),
    ],
)
def test_a_run_that_cannot_be_is_refused_as_train_refuses_it(config, capsys, words, problem):
    code, out, err = planned(capsys, "--model", config, *words)
    assert (code, out) == (2, "") and problem in err


def test_a_model_in_the_hubs_cache_is_found(config, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(config.read_text())
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert config_directory("some/model") == snapshot and config_directory(config) == config


def test_a_plan_needs_shapes_on_known_chips():
    model = CausalLM(DecoderConfig.from_hf(TINY), rngs=nnx.Rngs(0))
    with pytest.raises(TrainingError, match="the model has no adapter"):
        plan(model, TrainSettings(), max_length=8)
    mlj.apply_moe_lora(model, MIXTURE, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="model: expected one of abstract_base_model"):
        plan(model, TrainSettings(), max_length=8)
    here = mlj.abstract_base_model(TINY, mesh=mlj.make_mesh({"data": 1}))
    mlj.apply_moe_lora(here, MIXTURE, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="device: found 'cpu', expected one of TPU v5 lite"):
        plan(here, TrainSettings(), max_length=8)


def test_the_lora_has_as_many_numbers():
    targets = {"target_modules": ["q_proj"], "lora_dropout": 0.1}
    lora = lora_of(mlj.MoeLoraConfig(r=8, num_experts=4, top_k=2, scope="linear", **targets))
    assert (lora.r, lora.num_experts, lora.top_k, lora.lora_dropout) == (32, 1, None, 0.1)
    assert lora_of(mlj.MoeLoraConfig(r=[2, 4, 6], num_experts=3, **targets)).r == 12
    with pytest.raises(ConfigError, match="rank_pattern: found .*expected none") as error:
        lora_of(mlj.MoeLoraConfig(rank_pattern={"q_proj": 4}, num_experts_pattern={"q_proj": 2}, **targets))
    assert len(error.value.problems) == 2


ASSIGNMENT = """BufferAssignment:
allocation 0: size 512, constant:
 value: <1 bound @0> (size=512,offset=0): u32[]{:T(128)}
allocation 1: size 4096, parameter 0, shape |f32[8,128]| at ShapeIndex {}:
 value: <2 x @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
allocation 2: size 9999, color 1, preallocated-temp:
 value: <3 vmem @0> (size=9999,offset=0): f32[8,128]{1,0:T(8,128)S(1)}
allocation 3: size 4096, parameter 1, shape |f32[8,128]| at ShapeIndex {}, maybe-live-out:
 value: <4 w @0> (size=4096,offset=0): f32[8,128]{1,0:T(8,128)}
allocation 4: size 70000, preallocated-temp:
 value: <5 dot @0> (size=65536,offset=0): bf16[256,128]{1,0:T(8,128)(2,1)}
 value: <6 outer{1} (phi) @0> (size=65536,offset=0): bf16[256,128]{1,0:T(8,128)(2,1)}
 value: <7 either{0} @0> (size=2048,offset=65536): bf16[8,128]{1,0:T(8,128)(2,1)}
allocation 5: size 64, thread-local:
 value: <8 p @0> (size=64,offset=0): f32[8]{0:T(128)}
"""


def test_buffers_are_read_with_where_they_come_from():
    memory = read_memory(ASSIGNMENT, read_hlo(TEXT), largest=2)
    assert (memory.arguments, memory.temporaries, memory.total) == (8192, 70000, 8192 + 70000 + 512)
    dot, x = memory.buffers
    assert (dot.bytes, dot.shape, dot.op_name) == (65536, "bf16[256,128]", "jit(f)/dot")
    assert dot.source == "project/package/model.py:42" and (x.bytes, x.op_name) == (4096, "x")
    with pytest.raises(ValueError, match="found no allocation"):
        read_memory("", read_hlo(TEXT))
