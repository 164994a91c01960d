"""Ordinary LoRA adapters as experts: written by stock PEFT, combined, and compared with the average of their deltas."""

import copy
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import tyro
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import moe_lora_interop
import moe_lora_interop.peft_tuner  # registers MOE_LORA
import moe_lora_jax as mlj
from moe_lora_interop.checkpoint.prototypes import prototypes
from moe_lora_interop.cli import convert as verbs_convert
from moe_lora_interop.export.combining import combine
from moe_lora_jax.adapters.checkpoint import combine as combine_on_model
from tests.export_truth import IDS, base_logits, deltas_of, logits, merged_logits, torch_base
from tests.peers_data import ROOT

GQA = ROOT / "bases" / "gqa"
MODULES = ["q_proj", "down_proj"]


def save_lora(directory, seed, **fields):
    """An adapter that stock PEFT wrote, with random A and B; returns {module: delta} as PEFT itself computes it."""
    torch.manual_seed(seed)
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": MODULES,
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    model = get_peft_model(torch_base("gqa"), LoraConfig(**{**settings, **fields}))
    model.save_pretrained(directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and module.lora_A:
            found[name.removeprefix("base_model.model.")] = module.get_delta_weight("default").detach().numpy()
    return found


VARIANTS = {
    "equal": ({}, {}, {}),
    "unequal": ({"r": 2, "lora_alpha": 3}, {"r": 5, "lora_alpha": 16}, {}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True, "r": 6}, {"use_rslora": True}),
    "mixed_rslora": ({"use_rslora": True}, {"r": 6}, {}),
    "patterns": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"model\.layers\.1\.mlp\.down_proj": 5}},
        {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1}},
        {"r": 1},
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def loras(request, tmp_path_factory):
    """(directories, {module: average delta})."""
    root = tmp_path_factory.mktemp(request.param)
    paths = [root / f"lora_{n}" for n in range(3)]
    deltas = [
        save_lora(p, n, **fields) for n, (p, fields) in enumerate(zip(paths, VARIANTS[request.param], strict=True))
    ]
    return paths, {m: sum(d[m] for d in deltas) / 3 for m in deltas[0]}


def test_uniform_gates_give_the_average_of_the_deltas(loras):
    paths, average = loras
    adapter = combine(paths)
    assert adapter.config.num_experts == 3 and sorted(average) == adapter.modules
    for module, delta in deltas_of(adapter, lambda module, experts: np.full(experts, 1 / 3)).items():
        assert np.abs(delta).max() > 0.1
        np.testing.assert_allclose(delta, average[module], atol=1e-5)


def test_the_mixture_on_a_model_gives_the_logits_of_the_merged_average(tmp_path):
    deltas = [save_lora(tmp_path / str(n), n, **fields) for n, fields in enumerate(VARIANTS["unequal"])]
    expected = merged_logits("gqa", {m: sum(d[m] for d in deltas) / 3 for m in deltas[0]})
    assert np.abs(expected - base_logits("gqa")).max() > 0.1
    model = combine_on_model(mlj.load_base_model(GQA), [tmp_path / str(n) for n in range(3)])
    found = nnx.jit(lambda m, ids: m(ids))(model, jnp.asarray(IDS))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_every_value_is_kept(loras):
    paths, _ = loras
    adapter = combine(paths)
    for expert, path in enumerate(paths):
        for key, tensor in load_file(path / "adapter_model.safetensors").items():
            module, name = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
            stacked = adapter.tensors[module, name][expert]
            used = stacked[tuple(map(slice, tensor.shape))]
            assert used.tobytes() == tensor.tobytes()
            assert np.count_nonzero(stacked) == np.count_nonzero(tensor)  # the rest is zero


def two(tmp_path, first=None, second=None):
    paths = [tmp_path / "a", tmp_path / "b"]
    for seed, (path, fields) in enumerate(zip(paths, (first, second), strict=True)):
        save_lora(path, seed, **(fields or {}))
    return paths


def test_routers(tmp_path):
    paths = two(tmp_path, second={"r": 3})
    uniform = combine(paths, top_k=1, router_temperature=0.5)
    rows = [t for (_, role), t in uniform.tensors.items() if role == "router"]
    assert len(rows) == 4 and not any(t.any() for t in rows) and all(t.dtype == np.float32 for t in rows)
    assert (uniform.config.top_k, uniform.config.router_temperature) == (1, 0.5)
    random = [combine(paths, router="random", seed=s) for s in (0, 0, 1)]
    module = uniform.modules[0]
    first, same, other = (a.tensors[module, "router"] for a in random)
    assert np.array_equal(first, same) and not np.array_equal(first, other)
    assert 0.015 < first.std() < 0.025
    arrow = combine(paths, router="arrow", top_k=1)
    assert arrow.config.scoring_func == "abs_softmax"
    for module in arrow.modules:
        a, b = arrow.tensors[module, "lora_A"], arrow.tensors[module, "lora_B"]
        np.testing.assert_array_equal(arrow.tensors[module, "router"], prototypes(a, b)[0])
        _, _, right = np.linalg.svd(b[1] @ a[1])
        np.testing.assert_allclose(np.abs(arrow.tensors[module, "router"][1] @ right[0]), 1, atol=1e-5)


def test_config_of_the_mixture(tmp_path):
    paths = two(tmp_path, {"r": 2, "lora_dropout": 0.1}, {"lora_dropout": 0.1})
    config = combine(paths).config
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == ([2, 4], 8, 0.1, "CAUSAL_LM")
    assert config.base_model_name_or_path == "org/base" and config.target_modules == combine(paths).modules
    moe_lora_interop.write(combine(paths), tmp_path / "out")
    assert moe_lora_interop.read(tmp_path / "out").config == config


def test_the_same_adapter_may_be_two_experts(tmp_path):
    paths = two(tmp_path)
    assert combine([paths[0], paths[0]]).config.num_experts == 2


def test_dtypes_that_differ_become_float32(tmp_path):
    paths = two(tmp_path)
    file = paths[0] / "adapter_model.safetensors"
    save_file({n: t.astype("float16") for n, t in load_file(file).items()}, file)
    adapter = combine(paths)
    assert {t.dtype.name for t in adapter.tensors.values()} == {"float32"}
    half = [combine([paths[0]] * 2).tensors[m, "lora_A"].dtype.name for m in adapter.modules]
    assert set(half) == {"float16"}


def test_missing_modules(tmp_path):
    paths = two(tmp_path, {"target_modules": ["q_proj"]}, {"r": 2})
    with pytest.raises(moe_lora_interop.CheckpointError) as error:
        combine(paths)
    assert len(error.value.problems) == 2
    assert "a: has no model.layers.0.mlp.down_proj" in error.value.problems[0]
    adapter = combine(paths, fill_missing=True)
    module = "model.layers.0.mlp.down_proj"
    assert adapter.config.for_module(module).ranks == (1, 2)
    assert not adapter.tensors[module, "lora_A"][0].any() and not adapter.tensors[module, "lora_B"][0].any()


def test_different_bases(tmp_path):
    paths = two(tmp_path)
    config = json.loads((paths[1] / "adapter_config.json").read_text())
    (paths[1] / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/other"}))
    with pytest.raises(
        moe_lora_interop.CheckpointError, match="base model 'org/other'; the adapters must be for the same"
    ):
        combine(paths)
    assert combine(paths, allow_different_bases=True).config.base_model_name_or_path == "org/base"
    (paths[1] / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert combine(paths).config.base_model_name_or_path == "org/base"


def test_sizes_that_differ(tmp_path):
    paths = two(tmp_path)
    file = paths[1] / "adapter_model.safetensors"
    save_file(
        {n: t[:, :-1].copy() if n.endswith("q_proj.lora_A.weight") else t for n, t in load_file(file).items()}, file
    )
    with pytest.raises(
        moe_lora_interop.CheckpointError, match=r"q_proj has in, out = \(31, 32\), .*a has \(32, 32\)"
    ) as error:
        combine(paths)
    assert len(error.value.problems) == 2


@pytest.mark.filterwarnings("ignore:.*lora_bias=True", "ignore:.*have invalid shape")
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(fields, name, tmp_path):
    paths = two(tmp_path, fields)
    with pytest.raises(moe_lora_interop.CheckpointError, match=rf"a: {name}: found"):
        combine(paths)


def test_all_bad_directories_are_listed(tmp_path):
    (good,) = two(tmp_path)[:1]
    with pytest.raises(moe_lora_interop.CheckpointError) as error:
        combine([tmp_path / "x", good, ROOT / "xlora" / "depth2", tmp_path / "y"])
    text = "\n".join(error.value.problems)
    assert all(name in text for name in ("/x: ", "/y: ", "depth2")) and f"{good}:" not in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"router": "zero"}, "router: found 'zero', expected one of uniform, random, arrow"),
        ({"top_k": 3}, "top_k: found 3, expected at most num_experts = 2"),
        ({"router_temperature": 0.0}, "router_temperature: found 0.0"),
    ],
)
def test_wrong_arguments(arguments, reason, tmp_path):
    with pytest.raises(moe_lora_interop.ConfigError, match=reason):
        combine(two(tmp_path), **arguments)


def test_one_directory_is_no_mixture(tmp_path):
    with pytest.raises(moe_lora_interop.ConfigError, match="found 1, expected at least two"):
        combine([tmp_path])


def test_the_verb(tmp_path, capsys):
    paths = two(tmp_path)
    args = [*map(str, paths), str(tmp_path / "out"), "--router", "arrow", "--top-k", "1"]
    tyro.cli(verbs_convert.combine, args=args)
    assert "2 experts on 4 modules, router arrow" in capsys.readouterr().out
    assert moe_lora_interop.read(tmp_path / "out").config.scoring_func == "abs_softmax"
    with pytest.raises(moe_lora_interop.CheckpointError, match="not empty"):
        tyro.cli(verbs_convert.combine, args=args)
    with pytest.raises(moe_lora_interop.ConfigError, match="expected LORA_DIR LORA_DIR ... DST"):
        tyro.cli(verbs_convert.combine, args=args[:2])
    moe_lora_interop.convert(tmp_path / "out", tmp_path / "arrow", to="arrow")
    assert moe_lora_interop.detect(tmp_path / "arrow") == "arrow"


def test_loras_for_gpt2_whose_layers_store_their_weights_transposed(tmp_path):
    """Conv1D: PEFT sets fan_in_fan_out, and A and B are stored as for any other layer."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.2)
    base = GPT2LMHeadModel(config).eval()
    deltas = []
    for seed in range(2):
        settings = {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "init_lora_weights": False}
        torch.manual_seed(seed)
        lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **settings))
        lora.save_pretrained(tmp_path / str(seed))
        assert json.loads((tmp_path / str(seed) / "adapter_config.json").read_text())["fan_in_fan_out"] is True
        own = deltas_of(moe_lora_interop.read(tmp_path / str(seed)), None)
        np.testing.assert_allclose(logits(added(base, own)), logits(lora), atol=1e-5)
        deltas.append(own)
    moe_lora_interop.write(combine([tmp_path / "0", tmp_path / "1"]), tmp_path / "mixture")
    expected = logits(added(base, {m: (deltas[0][m] + deltas[1][m]) / 2 for m in deltas[0]}))
    assert np.abs(expected - logits(base)).max() > 0.1
    found = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "mixture")
    np.testing.assert_allclose(logits(found), expected, atol=1e-5)


def added(base, deltas):
    """A copy of the model that adds x delta^T behind each layer, so that nothing rests on how W is stored."""
    model = copy.deepcopy(base)
    for module, delta in deltas.items():
        weight = torch.as_tensor(np.asarray(delta, np.float32))
        model.get_submodule(module).register_forward_hook(lambda _, x, y, weight=weight: y + x[0] @ weight.T)
    return model
