"""Mixtures of feed-forward blocks as standalone Mixtral models: transformers' logits equal the mixture's."""

import dataclasses
import json
import re
import tracemalloc
from functools import cache

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM

import moe_lora_interop
import moe_lora_jax as mlj
from moe_lora_interop.disk.files import read_tensors
from moe_lora_interop.disk.lazy import Lazy
from moe_lora_interop.export import export_mixtral
from moe_lora_interop.export.mixtral import shard_writers
from tests.adapters import assert_same_tensors
from tests.hf import Saved, save_model
from tests.peers_data import ROOT, Peer

IDS = np.random.default_rng(3).integers(3, 90, (2, 11))
FFN = ["gate_proj", "up_proj", "down_proj"]
GQA = ROOT / "bases" / "gqa"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory)


def make(base, seed=0, **fields):
    """A random mixture on a base."""
    model = mlj.load_base_model(base)
    settings = {"r": 2, "num_experts": 4, "scope": "ffn", "top_k": 2, "target_modules": FFN, "init_lora_weights": False}
    mlj.apply_moe_lora(model, mlj.MoeLoraConfig(**{**settings, **fields}), rngs=nnx.Rngs(seed))
    adapter, rng = mlj.to_adapter(model), np.random.default_rng(seed)
    tensors = {
        (module, role): rng.normal(size=t.shape).astype("f4") if role.startswith("router") else t
        for (module, role), t in adapter.tensors.items()
    }
    return moe_lora_interop.Adapter(adapter.config, tensors)


def jax_logits(base, adapter=None):
    model = mlj.load_base_model(base)
    return np.asarray(nnx.jit(lambda m, ids: m(ids))(mlj.load_adapter(model, adapter) if adapter else model, IDS))


@torch.no_grad()
def transformers_logits(directory, dtype=torch.float32):
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert isinstance(model, MixtralForCausalLM)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()(torch.as_tensor(IDS)).logits.float().numpy()


def check(adapter, base, target, **options):
    expected = jax_logits(base, adapter)
    assert np.abs(base_logits(base) - expected).max() > 0.05
    export_mixtral(adapter, base, target, **options)
    np.testing.assert_allclose(transformers_logits(target), expected, atol=1e-4)


@cache
def base_logits(base):
    return jax_logits(base)


CASES = {
    "top_2": {},
    "dense": {"top_k": None},
    "top_1_of_3_with_temperature": {"top_k": 1, "num_experts": 3, "router_temperature": 0.25},
    "attention_and_head": {
        "lora_alpha": 2,  # with more, the model's own fp32 noise is 1e-4 of its logits of 11
        "target_modules": ["q_proj", "o_proj", "lm_head", *FFN],
        "num_experts_pattern": {"q_proj": 1, "o_proj": 1, "lm_head": 1},
    },
    "shared_a_rslora_patterns": {"shared_lora_A": True, "use_rslora": True, "rank_pattern": {"up_proj": 5}},
    "unequal_on_two_projections": {
        "r": [1, 2, 3, 2],
        "lora_alpha": [1, 8, 3, 5],
        "alpha_pattern": {"down_proj": 3},
        "target_modules": ["gate_proj", "down_proj"],
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_the_logits_are_the_mixtures(case, tmp_path):
    adapter = make(GQA, **CASES[case])
    check(adapter, GQA, tmp_path / "out")


@pytest.mark.parametrize("case", ["llama3_rope", "llama_tied", "llama_head_dim", "mistral"])
def test_every_base_that_maps(case, saved, tmp_path):
    adapter = make(saved(case)[1])
    check(adapter, saved(case)[1], tmp_path / "out")


def test_mixlora_of_the_peer_gives_the_peers_own_logits(tmp_path):
    peer = Peer("moe_peft/mixlora")
    export_mixtral(moe_lora_interop.read(peer.directory), peer.base, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found = model(torch.as_tensor(peer.reference["input_ids"])).logits.numpy()
    np.testing.assert_allclose(found, peer.reference["logits"], atol=1e-4)


def test_plain_lora_on_a_projection_is_in_every_expert(tmp_path):
    plain = make(GQA, num_experts_pattern={"up_proj": 1})
    tensors = {  # the same, said with four equal experts
        (module, role): np.repeat(t, 4, axis=0) if module.endswith("up_proj") else t
        for (module, role), t in plain.tensors.items()
    }
    same = moe_lora_interop.Adapter(dataclasses.replace(plain.config, num_experts_pattern={}), tensors)
    export_mixtral(plain, GQA, tmp_path / "plain")
    export_mixtral(same, GQA, tmp_path / "same")
    assert_same_tensors(*(load_file(tmp_path / d / "model.safetensors") for d in ("plain", "same")))


def test_shards_an_index_and_copied_files(saved, tmp_path):
    base = tmp_path / "base"
    save_model(saved("llama")[0], base, max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "secret.txt"):
        (base / name).write_text("{}")
    adapter = make(base)
    check(adapter, base, tmp_path / "out", max_shard_bytes=30_000)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    shards = [n for n in names if n.endswith(".safetensors")]
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    others = {"README.md", "config.json", "model.safetensors.index.json"}
    assert set(names) - set(shards) - others == {"tokenizer.json", "generation_config.json", "chat_template.jinja"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {n: shard for shard in shards for n in load_file(tmp_path / "out" / shard)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for s in shards for t in load_file(tmp_path / "out" / s).values()
    )


def test_the_tensors_are_what_transformers_itself_writes(tmp_path):
    adapter = make(GQA)
    export_mixtral(adapter, GQA, tmp_path / "out")
    MixtralForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "again"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def test_the_dtype_is_the_bases_own_or_the_one_asked_for(saved, tmp_path):
    base = tmp_path / "base"
    save_model(saved("llama")[0].to(torch.bfloat16), base)
    saved("llama")[0].to(torch.float32)
    adapter = make(base)
    notes = export_mixtral(adapter, base, tmp_path / "own")
    assert any("rounded to bfloat16" in note for note in notes)
    stored = read_tensors(tmp_path / "own" / "model.safetensors")
    assert {t.dtype.name for t in stored.values()} == {"bfloat16"}
    assert json.loads((tmp_path / "own" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    key = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    sizes = adapter.config.for_module("model.layers.0.mlp.gate_proj")
    a, b = (adapter.tensors["model.layers.0.mlp.gate_proj", role][1] for role in ("lora_A", "lora_B"))
    weight = read_tensors(base / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"].astype(np.float32)
    exact = weight + np.float32(sizes.scalings[1]) * (b.astype(np.float32) @ a.astype(np.float32))
    np.testing.assert_array_equal(stored[key], exact.astype(stored[key].dtype))
    export_mixtral(adapter, base, tmp_path / "wide", dtype="float32")
    wide = read_tensors(tmp_path / "wide" / "model.safetensors")
    np.testing.assert_array_equal(wide[key], exact)
    with pytest.raises(moe_lora_interop.CheckpointError, match="dtype: found 'int8'"):
        export_mixtral(adapter, base, tmp_path / "no", dtype="int8")


REFUSED = {
    "router_bias": ({"router_bias": True}, "router_bias: found true"),
    "threshold": ({"top_k": None, "threshold": 0.3}, "threshold: found 0.3"),
    "sigmoid": ({"scoring_func": "sigmoid"}, "scoring_func: found sigmoid, expected softmax"),
    "abs": ({"scoring_func": "abs_softmax"}, "scoring_func: found abs_softmax"),
    "top_p": ({"top_p": 0.5, "top_k": 2}, "top_p: found 0.5, expected null"),
    "entropy": ({"entropy_threshold": 0.5, "top_k": 2}, "entropy_threshold: found 0.5, expected null"),
    "identity": ({"scoring_func": "identity", "norm_topk_prob": False}, "scoring_func: found identity"),
    "sparsemax": ({"scoring_func": "sparsemax"}, "scoring_func: found sparsemax"),
    "temperature": ({"temperature_hidden_size": 3}, "temperature_hidden_size: found 3, expected null"),
    "norm": ({"norm_topk_prob": False}, "norm_topk_prob: found false"),
    "factor": ({"routed_scaling_factor": 2.0}, "routed_scaling_factor: found 2.0, expected 1"),
    "linear": ({"scope": "linear"}, "scope: found linear, expected ffn"),
    "e_by_layer": ({"num_experts_pattern": {r"layers\.1\.mlp(\..*)?": 3}}, "num_experts: differs by layer"),
    "k_by_layer": ({"top_k_pattern": {r"layers\.1\.mlp(\..*)?": 1}}, "top_k: differs by layer"),
    "missing_layer": ({"layers_to_transform": [1]}, r"model.layers.0.mlp: has no mixture"),
}


@pytest.mark.filterwarnings("ignore:.*cannot learn")
@pytest.mark.parametrize("case", REFUSED)
def test_mixtures_that_are_no_mixtral(case, tmp_path):
    fields, reason = REFUSED[case]
    adapter = make(GQA, **fields)
    with pytest.raises(moe_lora_interop.CheckpointError, match=reason):
        export_mixtral(adapter, GQA, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_reasons_are_listed(tmp_path):
    adapter = make(GQA, router_bias=True, scoring_func="sigmoid", norm_topk_prob=False)
    config = dataclasses.replace(adapter.config, modules_to_save=["lm_head"])
    with pytest.raises(moe_lora_interop.CheckpointError) as error:
        export_mixtral(moe_lora_interop.Adapter(config, adapter.tensors), GQA, tmp_path / "out")
    assert [p.split(":")[0] for p in error.value.problems] == [
        "router_bias",
        "scoring_func",
        "norm_topk_prob",
        "modules_to_save",
    ]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (
            "llama_biases",
            r"attention_bias: found True.*\n.*mlp_bias: found True(.*\n)*.*q_proj.bias: unexpected tensor",
        ),
        ("qwen2", r"architectures \['Qwen2ForCausalLM'\], expected LlamaForCausalLM or MistralForCausalLM"),
        ("qwen3", r"architectures \['Qwen3ForCausalLM'\]"),
        ("gemma2", r"architectures \['Gemma2ForCausalLM'\]"),
    ],
)
def test_bases_that_do_not_map(case, reason, saved, tmp_path):
    adapter = make(GQA)
    with pytest.raises(moe_lora_interop.CheckpointError, match=reason):
        export_mixtral(adapter, saved(case)[1], tmp_path / "out")


def test_bases_with_other_fields_or_tensors(saved, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    adapter = make(GQA)
    config, tensors, write = saved.copy("llama", base)
    config.update(quantization_config={"bits": 4}, sliding_window=7)
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    del tensors["model.norm.weight"]
    write()
    with pytest.raises(moe_lora_interop.CheckpointError) as error:
        export_mixtral(adapter, base, tmp_path / "out")
    assert [p.removeprefix("base: ").split(":")[0] for p in error.value.problems] == [
        "quantization_config",
        "sliding_window",
        "model.norm.weight",
        "model.layers.0.self_attn.q_norm.weight",
    ]
    for layers in (None, 0, 2**40):  # as many names as that would not fit in memory
        config.update(num_hidden_layers=layers)
        write()
        with pytest.raises(
            moe_lora_interop.CheckpointError, match=f"num_hidden_layers: found {layers}, expected a number from 1"
        ):
            export_mixtral(adapter, base, tmp_path / "out")


def test_a_base_of_other_sizes(saved, tmp_path):
    adapter = make(GQA)
    with pytest.raises(moe_lora_interop.CheckpointError, match=r"\[out, in\] = \[64, 32\], the base has \[48, 32\]"):
        export_mixtral(adapter, saved("llama")[1], tmp_path / "out")


@pytest.mark.parametrize("damage", ["missing", "index", "twice", "dtype", "outside", "shard"])
def test_damaged_bases(damage, saved, tmp_path):
    base = tmp_path / "base"
    save_model(saved("llama")[0], base, max_shard_size="40KB")
    index = base / "model.safetensors.index.json"
    shard = sorted(base.glob("model-*"))[1]
    adapter = make(GQA)
    if damage == "missing":
        shard.unlink()
    elif damage == "index":
        index.unlink()
    elif damage == "outside":
        index.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    elif damage == "shard":
        shard.write_bytes(shard.read_bytes()[:50])
    else:
        tensors = load_file(shard)
        if damage == "twice":
            tensors[next(iter(load_file(sorted(base.glob("model-*"))[0])))] = np.zeros(3, "f4")
        else:
            tensors = {name: tensor.astype("float64") for name, tensor in tensors.items()}
        save_file(tensors, shard)
    reason = {
        "missing": "missing file",
        "index": "neither",
        "twice": "but the index says",
        "dtype": "dtype F64",
        "outside": "is not a file name",
        "shard": "model-00002-of-00003.safetensors: Error while deserializing header",
    }[damage]
    with pytest.raises(moe_lora_interop.CheckpointError, match=reason):
        export_mixtral(adapter, base, tmp_path / "out")


def test_a_failing_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    adapter = make(GQA)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("moe_lora_interop.export.mixtral.BaseModel.read", fail)
    with pytest.raises(moe_lora_interop.CheckpointError, match="disk full"):
        export_mixtral(adapter, GQA, tmp_path / "out")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    shape = (256, 1024)  # 1 MiB
    plan = {f"t{n}": Lazy(np.dtype("f4"), shape, lambda n=n: np.full(shape, n, "f4")) for n in range(40)}
    tracemalloc.start()
    for name, write in shard_writers(plan, 12 << 20).items():
        write(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [len(load_file(s)) for s in shards] == [12, 12, 12, 4]
    assert all((tensor == int(re.sub(r"\D", "", n))).all() for s in shards for n, tensor in load_file(s).items())
