"""inspect reads headers only; verify finds what is wrong and notes what is odd."""

import io
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moe_lora_interop
from moe_lora_interop import CheckpointError, ConfigError, Finding
from tests.adapters import Q0, Q1, SHAPES, V0, make_adapter
from tests.peers_data import Peer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GOLDEN = Path(__file__).parent / "golden"
PREFIX = "base_model.model."


def written(path, **fields):
    moe_lora_interop.write(make_adapter(**fields), path)
    return path


def edited(path, metadata=None, **tensors):
    """The adapter at `path` with tensors replaced, its digest gone."""
    stored = load_file(path / WEIGHTS)
    stored |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(stored, path / WEIGHTS, metadata or {"format": "pt"})
    return path


def change(path, module, role, function):
    name = f"{PREFIX}{module}.moe_lora_{role}"
    stored = load_file(path / WEIGHTS)
    stored[name] = function(stored[name].copy())
    save_file(stored, path / WEIGHTS, {"format": "pt"})


def messages(findings, level):
    return [f.message for f in findings if f.level == level]


def hf_base(path, shapes=SHAPES, shards=1):
    """A Hugging Face model directory with the linear layers in `shapes` (in, out), and a norm."""
    path.mkdir()
    weights = {f"{m}.weight": np.zeros((n_out, n_in), ml_dtypes.bfloat16) for m, (n_in, n_out) in shapes.items()}
    weights["model.norm.weight"] = np.ones(5, "float32")
    for shard in range(shards):
        name = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(dict(list(weights.items())[shard::shards]), path / name)
    return path


# --- inspect --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inspect_describes_the_file(tmp_path, dtype):
    adapter = make_adapter(dtype=dtype, top_k=2, router_bias=True)
    moe_lora_interop.write(adapter, tmp_path)
    found = moe_lora_interop.inspect(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert (found.layout, found.config) == ("native", adapter.config)
    assert found.parameters == sum(t.size for t in stored.values())
    assert found.bytes == sum(t.nbytes for t in stored.values())
    assert {n: t.shape for n, t in found.tensors.items()} == {n: t.shape for n, t in stored.items()}
    assert found.metadata["format"] == "pt" and found.metadata["digest"].startswith("xxh3-128:")
    assert "2 largest" in found.routing and "softmax" in found.routing


def test_inspect_counts_bytes_of_every_dtype(tmp_path):
    edited(written(tmp_path), **{f"{PREFIX}{Q0}.moe_lora_A".replace(".", "__"): np.zeros((3, 2, 5), "float64")})
    assert moe_lora_interop.inspect(tmp_path).bytes == sum(t.nbytes for t in load_file(tmp_path / WEIGHTS).values())


def test_inspection_is_json_ready(tmp_path):
    found = moe_lora_interop.inspect(written(tmp_path)).to_dict()
    back = json.loads(json.dumps(found, allow_nan=False))
    assert back == found
    assert back["tensors"][f"{PREFIX}{Q0}.moe_lora_A"] == {"dtype": "F32", "shape": [3, 2, 5]}


@pytest.mark.parametrize(
    ("layout", "rank", "words"),
    [
        ("layouts/lora", 8, "without"),  # ranks 2 and 3: the least that vLLM has
        ("native/top_k", 16, "with"),  # 3 experts of rank 2, a router of 3 rows in 3 parts
        ("native/ffn", None, "--as mixtral"),
        ("native/tasks", None, "--task ID"),
        ("native/model", None, "--gates FILE.json"),
        ("layouts/loramoe", None, "--to native"),
    ],
)
def test_inspect_names_the_road_to_vllm(layout, rank, words):
    found = moe_lora_interop.inspect(GOLDEN / layout / "adapter").vllm
    assert (found.max_lora_rank, found.problems == []) == (rank, rank is not None)
    assert found.plugin == (words == "with") if rank else words in " ".join(found.problems)


def test_inspect_loads_no_tensor(tmp_path, monkeypatch):
    class HeaderOnly(io.BufferedReader):
        def readinto(self, buffer):
            raise AssertionError("a tensor is read")

    written(tmp_path)
    monkeypatch.setattr(moe_lora_interop.disk.files, "opened", lambda path, what: HeaderOnly(io.FileIO(path)))
    assert len(moe_lora_interop.inspect(tmp_path).tensors) == 12
    with pytest.raises(AssertionError, match="a tensor is read"):
        moe_lora_interop.read(tmp_path)  # the trap works


def test_inspect_refuses_what_it_does_not_know(tmp_path):
    with pytest.raises(CheckpointError):
        moe_lora_interop.inspect(tmp_path)
    written(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "r": 0}))
    with pytest.raises(ConfigError, match="r: found 0"):
        moe_lora_interop.inspect(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(), ["softmax(z)", "keep all", "divided by their sum"]),
        (dict(top_k=1, norm_topk_prob=False), ["1 largest", "not renormalised"]),
        (dict(threshold=0.25), ["p >= 0.25"]),
        (dict(threshold=0.25, adaptive_threshold=True), ["tau = 0.25 * sigmoid"]),
        (dict(scoring_func="abs_softmax", router_temperature=2.0), ["softmax(|z|)", "/ 2"]),
        (dict(scoring_func="sigmoid", router_bias=True, routed_scaling_factor=3), ["sigmoid(z)", "R x + b", "times 3"]),
        (dict(scoring_func="identity", norm_topk_prob=False), ["p = z, keep all, not renormalised"]),
        (dict(scoring_func="sparsemax"), ["z = R x, p = sparsemax(z), keep all"]),
        (dict(temperature_hidden_size=8, router_temperature=0.01), ["z = (R x) / T, T = 0.01 + softplus(-MLP(x)), p"]),
        (dict(router_input="expert_activations", router_bias=True), ["z = R relu(A x) + b, p"]),
        (dict(top_k=1, top_p=0.75), ["keep the 1 largest and more while their sum is at most 0.75"]),
        (
            dict(top_k=2, entropy_threshold=0.9, entropy_index=1.1, entropy_eps=1e-5),
            ["the 2 largest, all where the entropy H_1.1 of p + 1e-05 is above 0.9"],
        ),
        (dict(num_experts=1), ["plain LoRA"]),
    ],
    ids=str,
)
def test_the_routing_rule_in_words(tmp_path, fields, words):
    routing = moe_lora_interop.inspect(written(tmp_path, **fields)).routing
    assert all(word in routing for word in words), routing


# --- verify ---------------------------------------------------------------------------------------------------------


def test_a_sound_adapter_has_no_findings(tmp_path):
    assert moe_lora_interop.verify(written(tmp_path)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("value", "count"), [(np.nan, 2), (np.inf, 1), (-np.inf, 3)])
def test_values_that_are_not_finite_are_errors(tmp_path, dtype, value, count):
    written(tmp_path, dtype=dtype)

    def spoil(tensor):
        tensor.reshape(-1)[:count] = value
        return tensor

    change(tmp_path, V0, "A", spoil)
    (error,) = messages(moe_lora_interop.verify(tmp_path), "error")
    assert f"{V0} lora_A: {count} of 30 values" in error


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 0x7F800001), ("bfloat16", 0x7F81), ("float16", 0x7C01)])
def test_signalling_nans_are_found_without_a_warning(tmp_path, dtype, bits):
    written(tmp_path, dtype=dtype)

    def spoil(tensor):
        tensor.view(f"u{tensor.itemsize}").reshape(-1)[4] = bits
        return tensor

    change(tmp_path, Q1, "B", spoil)
    assert any(f"{Q1} lora_B: 1 of 36 values" in m for m in messages(moe_lora_interop.verify(tmp_path), "error"))


def test_an_adapter_that_does_nothing_is_noted(tmp_path):
    written(tmp_path)
    for module in SHAPES:
        change(tmp_path, module, "B", np.zeros_like)
    findings = moe_lora_interop.verify(tmp_path)
    assert messages(findings, "error") == []
    assert any("every lora_B is zero" in m for m in messages(findings, "note"))
    change(tmp_path, Q0, "B", np.ones_like)
    assert not any("zero" in f.message for f in moe_lora_interop.verify(tmp_path))


def test_a_missing_digest_is_noted(tmp_path):
    (finding,) = moe_lora_interop.verify(edited(written(tmp_path)))
    assert finding.level == "note" and "no digest" in finding.message


def test_unknown_metadata_are_noted(tmp_path):
    edited(written(tmp_path), metadata={"format": "pt", "author": "me", "z": "1"})
    notes = messages(moe_lora_interop.verify(tmp_path), "note")
    assert any("'author'" in n and "'me'" in n for n in notes) and any("'z'" in n for n in notes)
    assert not any("'format'" in n for n in notes)


def test_a_header_of_another_version_is_an_error(tmp_path):
    edited(written(tmp_path), metadata={"format": "pt", "format_version": "2"})
    assert any("format_version" in m and "'2'" in m for m in messages(moe_lora_interop.verify(tmp_path), "error"))


def test_everything_that_read_refuses_is_a_list_of_errors(tmp_path):
    written(tmp_path)
    raw = bytearray((tmp_path / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(raw)
    (finding,) = moe_lora_interop.verify(tmp_path)
    assert finding.level == "error" and "digest" in finding.message
    stored = load_file(tmp_path / WEIGHTS)
    for name in [n for n in stored if n.endswith("moe_lora_A")]:
        del stored[name]
    save_file(stored, tmp_path / WEIGHTS)
    findings = moe_lora_interop.verify(tmp_path)
    assert len(findings) == len(SHAPES) and all(f.level == "error" for f in findings)


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_what_is_no_checkpoint_is_an_error_and_no_exception(tmp_path, name):
    (tmp_path / "file").write_text("")
    (finding,) = moe_lora_interop.verify(tmp_path / name)
    assert isinstance(finding, Finding) and finding.level == "error" and name in finding.message


@pytest.mark.parametrize("shards", [1, 2])
def test_an_adapter_that_fits_its_base(tmp_path, shards):
    base = hf_base(tmp_path / "base", shards=shards)
    assert moe_lora_interop.verify(written(tmp_path / "out"), base=base) == []
    assert moe_lora_interop.verify(str(tmp_path / "out"), base=str(base)) == []


def test_every_mismatch_with_the_base_is_an_error(tmp_path):
    shapes = {**SHAPES, Q0: (5, 7), V0: (4, 3)}
    del shapes[Q1]
    base = hf_base(tmp_path / "base", shapes=shapes)
    errors = messages(moe_lora_interop.verify(written(tmp_path / "out"), base=base), "error")
    assert len(errors) == 3
    for module, found, expected in ((Q0, "[6, 5]", "[7, 5]"), (V0, "[3, 5]", "[3, 4]")):
        assert any(m.startswith(module) and found in m and expected in m for m in errors)
    assert any(m.startswith(Q1) and "not in the base" in m for m in errors)


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "damaged"])
def test_a_wrong_base_directory_is_an_error(tmp_path, kind):
    base = tmp_path / "base"
    if kind == "file":
        base.write_text("")
    elif kind != "missing":
        base.mkdir()
    if kind == "damaged":
        (base / "model.safetensors").write_bytes(b"\0" * 20)
    findings = moe_lora_interop.verify(written(tmp_path / "out"), base=base)
    assert len(messages(findings, "error")) == 1 and "base" in findings[-1].message


@pytest.mark.parametrize("name", ["loramoe/adapter", "moe_peft/mixlora", "xlora/depth2", "arrow/arrow", "mola/adapter"])
def test_other_layouts_are_inspected_and_verified(name):
    peer = Peer(name)
    found = moe_lora_interop.inspect(peer.directory, **peer.options)
    assert found.layout == moe_lora_interop.detect(peer.directory)
    assert found.config == moe_lora_interop.read(peer.directory, **peer.options).config
    if not peer.options:
        assert [f.level for f in moe_lora_interop.verify(peer.directory)] == ["note"]  # no digest
