"""interop/moe_lora_interop/FORMAT.md against the code: tables, digest, presence rules, example."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors import safe_open
from safetensors.numpy import load_file

import moe_lora_interop
from moe_lora_interop.config.adapter_config import BOOKKEEPING, FORMAT_VERSION
from moe_lora_interop.dialects import NATIVE
from moe_lora_interop.disk.dtypes import STORED
from moe_lora_interop.disk.files import read_tensors
from moe_lora_interop.rules.tensors import AXES
from tests.adapters import make_adapter
from tools.samples import SAMPLES, random_adapter, sample

DOC = (Path(moe_lora_interop.__file__).parent / "FORMAT.md").read_text("utf-8")


def rows(header):
    """The cells of the table with this header line."""
    lines = DOC[DOC.index(header) :].splitlines()[2:]
    table = lines[: next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def test_the_tensor_table_is_the_rules():
    documented = {(key.strip("`"), shape.strip("`[]").replace(",", "")) for key, shape, _ in rows("| key | shape |")}
    rules = [rule for rule in NATIVE.rules if rule.copy != "base"]  # section 3 says those in a sentence
    assert documented == {(rule.key, rule.axes) for rule in rules}
    assert len(rows("| key | shape |")) == len(rules)


def test_every_axis_is_explained():
    explained = {name for cell, _ in rows("| axis | size |") for name in re.findall(r"`(\w+)`", cell)}
    used = {axis for rule in NATIVE.rules for axis in rule.axes.split()}
    assert explained == used <= AXES


def test_the_config_table_is_the_config():
    fields = {f.name: f for f in dataclasses.fields(moe_lora_interop.MoeLoraConfig)}
    table = rows("| field | default |")
    assert [name.strip("`") for name, *_ in table] == list(fields)
    for name, default, allowed, meaning in table:
        field = fields[name.strip("`")]
        value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        assert json.loads(default.strip("`")) == value, name
        assert allowed == field.metadata["words"], name
        assert len(meaning) > 8, name
        assert meaning.startswith("version 2: ") == ("version" in field.metadata and not field.metadata["values"]), name
        for value in field.metadata.get("values", ()):
            assert f"`{field.name}` {value}" in DOC


def test_names_in_the_text_exist():
    known = {f.name for f in dataclasses.fields(moe_lora_interop.MoeLoraConfig)}
    text = DOC[DOC.index("Patterns are") : DOC.index("## 6")]
    words = set(re.findall(r"\b[a-z]+(?:_[a-zA-Z]+)+\b", text))
    assert words - known <= {"lora_alpha_e", "g_e", "s_e", "g_qe", "r_e", "sum_e", "expert_activations"}, words - known
    section = DOC[DOC.index("without the bookkeeping fields (") :].split("which people")[0]
    assert set(re.findall(r"`(\w+)`", section)) == set(BOOKKEEPING)
    assert f"version {FORMAT_VERSION}" in DOC and all(d in DOC for d in STORED)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_digest_follows_from_the_text(dtype, tmp_path):
    adapter = make_adapter(dtype=dtype, lora_alpha=[16, 16.5, 1e-7], rank_pattern={"é": 3}, base_model_name_or_path="x")
    moe_lora_interop.write(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    with safe_open(tmp_path / "adapter_model.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    tensors = read_tensors(tmp_path / "adapter_model.safetensors")
    found = metadata.pop("digest")
    assert metadata == {"format": "pt", "format_version": "1"}
    bookkeeping = re.search(r"bookkeeping fields \((.*?)\)", DOC, re.DOTALL)[1]
    described = {
        "config": {k: v for k, v in config.items() if f"`{k}`" not in bookkeeping},
        "metadata": metadata,
        "tensors": [[key, tensors[key].dtype.name, list(tensors[key].shape)] for key in sorted(tensors)],
    }
    content = json.dumps(described, sort_keys=True).encode() + b"".join(
        tensors[key].tobytes() for key in sorted(tensors)
    )
    assert found == "xxh3-128:" + xxhash.xxh3_128(content).hexdigest()


def documented_tensors(config, modules, size_in, size_out):
    """{key: shape} written from the document's sections 2 to 4, once more and not from the code."""
    c, expected, routed = config, {}, []
    for module in modules:
        sizes = c.for_module(module)
        experts, rank = sizes.num_experts, max(sizes.ranks)
        expected[f"base_model.model.{module}.moe_lora_A"] = (1 if c.shared_lora_A else experts, rank, size_in)
        expected[f"base_model.model.{module}.moe_lora_B"] = (experts, size_out, rank)
        routed += [module] if experts > 1 else []
    owners = (
        routed if c.scope == "linear" else sorted({m.rpartition(".")[0] for m in routed}) if c.scope == "ffn" else []
    )
    for owner in owners:
        key, logits = f"base_model.model.{owner}.moe_lora", c.for_module(owner).num_experts * c.n_splits
        if c.router_depth:
            codes = (1 if c.shared_lora_A else c.num_experts) * max(c.for_module(owner).ranks)
            expected[f"{key}_router.weight"] = (logits, codes if c.router_input == "expert_activations" else size_in)
            if c.router_bias:
                expected[f"{key}_router.bias"] = (logits,)
            if c.adaptive_threshold:
                expected |= {f"{key}_threshold.weight": (1, size_in), f"{key}_threshold.bias": (1,)}
            if width := c.temperature_hidden_size:
                expected |= {f"{key}_temperature_0.weight": (width, size_in), f"{key}_temperature_0.bias": (width,)}
                expected |= {f"{key}_temperature_1.weight": (1, width), f"{key}_temperature_1.bias": (1,)}
        if c.router_input == "task":
            expected[f"{key}_task_embedding.weight"] = (c.num_tasks, c.task_embedding_dim or logits)
    if c.scope == "model" and routed:
        logits = c.num_experts * c.n_splits * (len(routed) if c.layerwise else 1)
        for j in range(c.router_depth):
            unit = logits if j == c.router_depth - 1 else c.router_hidden_size
            read = c.router_hidden_size if j else c.task_embedding_dim or size_in
            expected[f"base_model.moe_lora_router_{j}.weight"] = (unit, read)
            if c.router_bias:
                expected[f"base_model.moe_lora_router_{j}.bias"] = (unit,)
        if c.router_input == "task":
            expected["base_model.moe_lora_task_embedding.weight"] = (c.num_tasks, c.task_embedding_dim or logits)
    return expected


@pytest.mark.parametrize("name", SAMPLES)
def test_presence_and_shapes_follow_from_the_text(name, tmp_path):
    adapter = sample(name)
    moe_lora_interop.write(adapter, tmp_path)
    stored = {key: t.shape for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert stored == documented_tensors(adapter.config, adapter.modules, 8, 12)


def test_a_table_of_logits_for_the_whole_model(tmp_path):
    fields = {
        "scope": "model",
        "router_input": "task",
        "router_depth": 0,
        "num_tasks": 3,
        "mix": "weights",
        "n_splits": 2,
    }
    modules = ["model.layers.0.self_attn.q_proj"]
    config = moe_lora_interop.MoeLoraConfig(num_experts=4, r=2, target_modules=modules, **fields)
    moe_lora_interop.write(random_adapter(config, modules), tmp_path)
    stored = {key: t.shape for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert stored == documented_tensors(config, modules, 8, 12)


def test_the_example_is_an_adapter(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "FORMAT.md", "exec"), {})
    adapter = moe_lora_interop.read(tmp_path)
    assert (adapter.config.num_experts, adapter.config.r, adapter.modules) == (
        2,
        1,
        ["model.layers.0.self_attn.q_proj"],
    )
    assert np.array_equal(adapter.tensors[adapter.modules[0], "lora_A"], np.ones((2, 1, 3), np.float32))
