"""Exports for stock PEFT: each directory is loaded by it and gives the logits of the merged base."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import moe_lora_interop
from moe_lora_interop.export import export_lora, export_lora_experts, gates_from_file, uniform_gates
from moe_lora_interop.export.plain_lora import read_plain_lora
from moe_lora_interop.export.task_gates import task_gates
from tests.adapters import make_adapter
from tests.export_truth import base_logits, deltas_of, merged_logits, stock_logits
from tests.peers_data import BASES, READABLE, Peer

LINEAR = [p for p in READABLE if p.name in {"xlora/depth2", "hydralora/adapter", "moe_peft/loramoe", "mola/adapter"}]


def base_of(peer):
    return BASES.get(peer.name.split("/")[0], "gqa")


def read(peer):
    return moe_lora_interop.read(peer.directory, **peer.options)


def close(found, expected, base):
    assert np.abs(expected - base_logits(base)).max() > 1e-2  # the adapter does something
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("peer", [*LINEAR, Peer("moe_peft/mixlora"), Peer("poly/poly")], ids=lambda p: p.name)
def test_each_expert_is_an_ordinary_lora(peer, tmp_path):
    adapter, base = read(peer), base_of(peer)
    export_lora_experts(adapter, tmp_path / "out")
    folders = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir())
    assert folders == [f"expert_{e}" for e in range(adapter.config.num_experts)]
    last = adapter.config.num_experts - 1
    deltas = deltas_of(adapter, lambda module, experts: np.arange(experts) == last)
    close(stock_logits(base, tmp_path / "out" / f"expert_{last}"), merged_logits(base, deltas), base)


def test_experts_are_written_unpadded_with_their_own_rank_and_alpha(tmp_path):
    adapter = make_adapter(r=[1, 3, 2], lora_alpha=[4, 5, 6], alpha_pattern={"q_proj": 8}, base_model_name_or_path="b")
    export_lora_experts(adapter, tmp_path / "out")
    for expert, (rank, alpha) in enumerate([(1, 4), (3, 5), (2, 6)]):
        directory = tmp_path / "out" / f"expert_{expert}"
        config = json.loads((directory / "adapter_config.json").read_text())
        assert (config["r"], config["rank_pattern"], config["base_model_name_or_path"]) == (rank, {}, "b")
        module = adapter.modules[0]  # a q_proj, then v_proj
        own = {config["lora_alpha"], *config["alpha_pattern"].values()}
        assert own == {alpha, 8}
        stored = load_file(directory / "adapter_model.safetensors")
        a, b = (stored[f"base_model.model.{module}.{name}.weight"] for name in ("lora_A", "lora_B"))
        assert (a.shape[0], b.shape[1]) == (rank, rank)
        np.testing.assert_array_equal(a, adapter.tensors[module, "lora_A"][expert, :rank])
        np.testing.assert_array_equal(b, adapter.tensors[module, "lora_B"][expert, :, :rank])


def test_rslora_stays_unless_ranks_differ_by_module(tmp_path):
    export_lora_experts(make_adapter(use_rslora=True), tmp_path / "same")
    config = json.loads((tmp_path / "same" / "expert_0" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"]) == (True, 16)
    adapter = make_adapter(use_rslora=True, rank_pattern={"q_proj": 4})
    export_lora_experts(adapter, tmp_path / "differ")
    exported = read_plain_lora(tmp_path / "differ" / "expert_0")
    assert not exported.config.use_rslora
    for module in adapter.modules:
        expected = adapter.config.for_module(module).scalings[0]
        assert exported.config.for_module(module).scalings[0] == pytest.approx(expected, rel=1e-15)


def test_bfloat16_experts_keep_their_bits(tmp_path):
    adapter = make_adapter(dtype="bfloat16")
    export_lora_experts(adapter, tmp_path / "out")
    exported = read_plain_lora(tmp_path / "out" / "expert_1")
    for (module, role), tensor in exported.tensors.items():
        assert tensor.dtype.name == "bfloat16"
        assert tensor[0].tobytes() == adapter.tensors[module, role][1].tobytes()


@pytest.mark.parametrize("peer", LINEAR, ids=lambda p: p.name)
def test_uniform_gates(peer, tmp_path):
    adapter, base = read(peer), base_of(peer)
    export_lora(adapter, tmp_path / "out", uniform_gates(adapter), "uniform")
    factor = adapter.config.routed_scaling_factor
    deltas = deltas_of(adapter, lambda module, experts: np.full(experts, factor / experts))
    close(stock_logits(base, tmp_path / "out"), merged_logits(base, deltas), base)


def test_gates_from_a_file(tmp_path):
    peer = Peer("xlora/depth2")
    adapter = read(peer)
    gates = dict(zip(adapter.modules, np.random.default_rng(0).normal(size=(99, 4)), strict=False))
    gates[adapter.modules[1]][2] = 0.0  # left out
    (tmp_path / "gates.json").write_text(json.dumps({m: g.tolist() for m, g in gates.items()}))
    export_lora(adapter, tmp_path / "out", gates_from_file(adapter, tmp_path / "gates.json"), "a file")
    expected = merged_logits("gqa", deltas_of(adapter, lambda module, experts: gates[module]))
    close(stock_logits("gqa", tmp_path / "out"), expected, "gqa")
    exported = read_plain_lora(tmp_path / "out").config
    ranks = adapter.config.for_module(adapter.modules[1]).ranks
    assert exported.for_module(adapter.modules[1]).rank == sum(ranks) - ranks[2]
    assert all(exported.for_module(m).scalings == (1.0,) for m in adapter.modules)


@pytest.mark.parametrize("name", ["moelora/adapter", "poly/poly", "poly/mhr_splits2"])
def test_a_task_is_exactly_one_lora_and_gives_the_peers_own_logits(name, tmp_path):
    peer = Peer(name)
    reference, adapter = peer.reference, read(peer)
    for task in sorted(set(reference["task_ids"].tolist())):
        export_lora(adapter, tmp_path / str(task), task_gates(adapter, [task]), f"task {task}")
        rows = reference["task_ids"] == task
        found = stock_logits(base_of(peer), tmp_path / str(task), reference["input_ids"][rows])
        np.testing.assert_allclose(found, reference["logits"][rows], atol=1e-4)
    rank = adapter.config.r if adapter.config.mix == "weights" else adapter.config.r * adapter.config.num_experts
    assert read_plain_lora(tmp_path / str(task)).config.r == rank


def test_several_tasks_are_averaged_as_the_peer_does(tmp_path):
    peer = Peer("moelora/adapter")
    reference, adapter = peer.reference, read(peer)
    for row, ids in enumerate(reference["multi_task_ids"].tolist()):
        export_lora(adapter, tmp_path / str(row), task_gates(adapter, ids), "tasks")
        found = stock_logits(base_of(peer), tmp_path / str(row), reference["input_ids"][row : row + 1])
        np.testing.assert_allclose(found, reference["multi_logits"][row : row + 1], atol=1e-4)


def test_one_expert_of_whole_blocks_is_a_lora(tmp_path):
    adapter = read(Peer("moe_peft/mixlora"))
    (tmp_path / "gates.json").write_text("[0, 0, 1, 0]")
    export_lora(adapter, tmp_path / "out", gates_from_file(adapter, tmp_path / "gates.json"), "a file")
    deltas = deltas_of(adapter, lambda module, experts: np.arange(experts) == 2)
    close(stock_logits("moe_peft", tmp_path / "out"), merged_logits("moe_peft", deltas), "moe_peft")


def test_mixtures_of_whole_blocks_are_refused_with_the_reason(tmp_path):
    adapter = read(Peer("moe_peft/mixlora"))
    with pytest.raises(moe_lora_interop.ConfigError, match="the activation stands between") as error:
        export_lora(adapter, tmp_path / "out", uniform_gates(adapter), "uniform")
    assert len(error.value.problems) == 6 and "gates [0.25, 0.25, 0.25, 0.25]" in error.value.problems[0]
    gates = uniform_gates(adapter)
    for number, module in enumerate(gates):  # one expert each, but not the same one in a block
        gates[module] = np.eye(4)[number % 3][None]
    with pytest.raises(moe_lora_interop.ConfigError, match="the same in the whole block"):
        export_lora(adapter, tmp_path / "out", gates, "a file")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([0.5, 0.5], r"found \[0.5, 0.5\], expected 3 finite numbers"),
        ([1, 2, "x"], "expected 3 finite numbers"),
        ([1, 2, True], "expected 3 finite numbers"),
        ([1, 2, float("nan")], "expected 3 finite numbers"),
        ([[1, 2, 3], [1, 2]], "expected 3 finite numbers"),
        ([[1, 2, 3], 4], "expected 3 finite numbers"),
        ([], "expected 3 finite numbers"),
        ({}, "model.layers.1.self_attn.v_proj: no gates"),
        ({"model": [1, 0, 0], "lm_head": [1, 0, 0]}, "lm_head: names no module with a router"),
        ("uniform", "found str, expected a list or an object"),
        ([0, 0, 0], "found only zeros"),
    ],
)
def test_wrong_gates(data, problem, tmp_path):
    adapter = make_adapter()
    (tmp_path / "gates.json").write_text(json.dumps(data))
    with pytest.raises(moe_lora_interop.ConfigError, match=problem):
        export_lora(adapter, tmp_path / "out", gates_from_file(adapter, tmp_path / "gates.json"), "a file")


def test_a_missing_gate_file_and_a_used_target(tmp_path):
    adapter = make_adapter()
    with pytest.raises(moe_lora_interop.CheckpointError, match="nothing.json"):
        gates_from_file(adapter, tmp_path / "nothing.json")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    for export in (export_lora_experts, lambda a, d: export_lora(a, d, uniform_gates(a), "uniform")):
        with pytest.raises(moe_lora_interop.CheckpointError, match="not empty"):
            export(adapter, tmp_path / "out")
        with pytest.raises(moe_lora_interop.CheckpointError, match="found a file"):
            export(adapter, tmp_path / "out" / "x")


def test_modules_to_save_are_refused(tmp_path):
    adapter = make_adapter(modules_to_save=["lm_head"])
    for export in (export_lora_experts, lambda a, d: export_lora(a, d, uniform_gates(a), "uniform")):
        with pytest.raises(
            (moe_lora_interop.CheckpointError, moe_lora_interop.ConfigError),
            match=r"modules_to_save: found \['lm_head'\]",
        ):
            export(adapter, tmp_path / "out")


def test_the_readme_says_what_is_lost(tmp_path):
    adapter = make_adapter(
        num_experts_pattern={"v_proj": 1}, routed_scaling_factor=2.0, base_model_name_or_path="org/b"
    )
    notes = export_lora_experts(adapter, tmp_path / "experts")
    for path in (tmp_path / "experts" / "README.md", tmp_path / "experts" / "expert_1" / "README.md"):
        text = path.read_text()
        assert "The router is lost" in text and "org/b" in text and all(note in text for note in notes)
    assert any("Plain LoRA on 2 modules" in n for n in notes) and any("routed_scaling_factor 2" in n for n in notes)
    notes = export_lora(adapter, tmp_path / "lora", uniform_gates(adapter), "uniform")
    text = (tmp_path / "lora" / "README.md").read_text()
    assert "every token gets the same gates (uniform)" in text and notes[0] in text
    task = read(Peer("poly/poly"))
    notes = export_lora(task, tmp_path / "task", task_gates(task, [1]), "task 1")
    assert notes == ["The gates are fixed (task 1): exact for these tasks, and the router for all others is lost."]
