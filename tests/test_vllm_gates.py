"""The gates of many adapters in one batch against the tuner's and the formula, each adapter alone."""

import functools

import numpy as np
import pytest
import torch

from moe_lora_interop.config import MoeLoraConfig
from moe_lora_interop.peft_tuner.gating import route
from moe_lora_interop.vllm_plugin.gates import gates
from moe_lora_interop.vllm_plugin.rules import FIELDS, Rule
from moe_lora_interop.vllm_plugin.tables import Gating, Tables, gated, gated_by_adapter, units_of
from tests.numpy_mixture import decide

RULES = [
    dict(num_experts=4),
    dict(num_experts=4, top_k=2, routed_scaling_factor=2.5),
    dict(num_experts=8, top_k=2, norm_topk_prob=False, router_temperature=0.5),
    dict(num_experts=3, threshold=0.3),
    dict(num_experts=5, threshold=0.2, norm_topk_prob=False),
    dict(num_experts=4, threshold=0.5, adaptive_threshold=True),
    dict(num_experts=7, threshold=0.4, adaptive_threshold=True, norm_topk_prob=False, router_bias=True),
    dict(num_experts=4, scoring_func="abs_softmax", top_k=3),
    dict(num_experts=4, scoring_func="sigmoid", norm_topk_prob=False),
    dict(num_experts=6, scoring_func="sigmoid", top_k=2, router_bias=True),
    dict(num_experts=4, scoring_func="sigmoid", threshold=0.6),
    dict(num_experts=4, scoring_func="identity", norm_topk_prob=False),
    dict(num_experts=5, scoring_func="identity", norm_topk_prob=False, top_k=2),
    dict(num_experts=8, scoring_func="sparsemax"),
    dict(num_experts=6, scoring_func="sparsemax", top_k=2),
    dict(num_experts=4, scoring_func="sparsemax", threshold=0.25, router_temperature=2.0),
    dict(num_experts=6, top_k=1, top_p=0.8),
    dict(num_experts=6, top_k=2, entropy_threshold=0.7),
    dict(num_experts=4, top_k=1, top_p=0.5, entropy_threshold=0.8, entropy_index=2.0, entropy_eps=1e-3),
    dict(num_experts=16, top_k=4, router_bias=True),
]
CONFIGS = [MoeLoraConfig(r=2, **rule) for rule in RULES]
UNITS = 16


def batch(seed, scale=1.5):
    """(adapter of each token; the router's outputs with bias [token, unit]; biases): tokens of all adapters mixed."""
    rng = np.random.default_rng(seed)
    adapter = rng.permutation(np.repeat(np.arange(len(CONFIGS)), 6))
    units = (scale * rng.standard_normal((len(adapter), UNITS))).astype(np.float32)
    biases = [rng.standard_normal(c.num_experts).astype(np.float32) * c.router_bias for c in CONFIGS]
    return adapter, units, biases


def rule_of(config, bias=0.25):
    return Rule.of(config, config.for_module("x"), bias if config.adaptive_threshold else 0)


def rows(adapter, biases):
    of_adapter = [rule_of(c).row(b, UNITS) for c, b in zip(CONFIGS, biases, strict=True)]
    return torch.tensor([of_adapter[a] for a in adapter])


def logits_and_tau(config, units, bias):
    """z [token, expert] and the threshold of one adapter's tokens, with the config's words."""
    experts = config.num_experts
    tau = config.threshold
    if config.adaptive_threshold:
        tau = tau / (1 + np.exp(-(units[:, experts : experts + 1].astype(np.float64) + 0.25)))
    return (units[:, :experts] + bias) / np.float32(config.router_temperature), tau


@pytest.mark.parametrize("seed", range(4))
def test_the_tuners_gates_in_a_mixed_batch(seed):
    adapter, units, biases = batch(seed)
    found = gates(torch.from_numpy(units), rows(adapter, biases))
    for number, config in enumerate(CONFIGS):
        mine = adapter == number
        z, tau = logits_and_tau(config, units[mine], biases[number])
        tau = torch.from_numpy(tau).float() if isinstance(tau, np.ndarray) else tau
        expected = route(torch.from_numpy(z), config, config.top_k, tau).gates * config.routed_scaling_factor
        torch.testing.assert_close(found[mine, : config.num_experts], expected, rtol=2e-6, atol=1e-6)
        assert not found[mine, config.num_experts :].any()


@pytest.mark.parametrize("seed", range(4))
def test_the_formulas_gates_in_a_mixed_batch(seed):
    adapter, units, biases = batch(seed)
    found = gates(torch.from_numpy(units), rows(adapter, biases)).numpy()
    for token, number in enumerate(adapter):
        config = CONFIGS[number]
        z, tau = logits_and_tau(config, units[token : token + 1], biases[number])
        tau = tau.item() if isinstance(tau, np.ndarray) else tau
        expected = decide(z[0].astype(np.float64), config, config.top_k, tau)[2] * config.routed_scaling_factor
        np.testing.assert_allclose(found[token, : config.num_experts], expected, rtol=1e-5, atol=2e-6)


def test_of_equal_logits_the_lower_expert_wins():
    config = MoeLoraConfig(num_experts=4, top_k=2, scoring_func="sigmoid", norm_topk_prob=False)
    row = torch.tensor([rule_of(config).row([0.0] * 4, UNITS)])
    found = gates(torch.zeros(1, UNITS), row)
    assert found[0, :5].tolist() == [0.5, 0.5, 0, 0, 0]


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_saturated_and_equal_logits_stay_finite(scale):
    adapter, units, biases = batch(0, scale)
    units = np.sign(units) * np.float32(scale)
    found = gates(torch.from_numpy(units), rows(adapter, biases))
    assert torch.isfinite(found).all()


def test_one_compiled_program_serves_every_rule():
    """One graph, and no graph more when other adapters are loaded."""
    torch._dynamo.reset()
    programs = []

    def count(graph, inputs):
        programs.append(graph)
        return graph.forward

    compiled = torch.compile(gates, fullgraph=True, backend=count)
    for seed in range(3):
        adapter, units, biases = batch(seed)
        arguments = torch.from_numpy(units), rows(adapter, biases)
        torch.testing.assert_close(compiled(*arguments), gates(*arguments), rtol=0, atol=0)
    assert len(programs) == 1


SLICES, SLOTS, RANK = 2, 3, 32


def filled(parts=1):
    """Slot 0: two slices of unequal ranks; slot 1: a plain LoRA; slot 2: a mixture in the second slice only."""
    tables = Tables(SLICES, SLOTS, RANK, parts)
    tables.fill(0, [Gating(rule_of(CONFIGS[1]), (0.0,) * 4, (1, 2, 3, 1)), Gating(rule_of(CONFIGS[3]), (), (2, 2, 2))])
    tables.fill(2, [Gating(), Gating(rule_of(CONFIGS[9]), (0.5, -0.5, 0, 0, 0, 1), (1,) * 6)])
    return tables


def expected_factors(codes, tables, slot):
    """[slice, column] of one token of a slot, column by column."""
    factors = np.ones((SLICES, RANK), np.float32)
    loaded = {(0, 0): (1, 4, 0), (0, 1): (3, 3, 0), (2, 1): (9, 6, np.float32([0.5, -0.5, 0, 0, 0, 1]))}
    ranks = {(0, 0): (1, 2, 3, 1), (0, 1): (2, 2, 2), (2, 1): (1,) * 6}
    for (its_slot, s), (number, experts, bias) in loaded.items():
        if its_slot == slot:
            rows = tables.rows
            z = [codes[s, RANK - (u + 1) * rows : RANK - u * rows].sum() for u in range(experts)]
            config = CONFIGS[number]
            g = decide(np.float64(z) + bias, config, config.top_k, config.threshold)[2] * config.routed_scaling_factor
            columns = np.repeat(np.arange(experts), ranks[its_slot, s])
            factors[s, : len(columns)] = g[columns]
    return factors


@pytest.mark.parametrize("parts", [1, 3])
def test_each_column_is_multiplied_by_the_gate_of_its_expert(parts):
    tables = filled(parts)
    rng = np.random.default_rng(0)
    slots = rng.permutation([-1, 0, 1, 2] * 5)
    codes = rng.standard_normal((SLICES, len(slots), RANK)).astype(np.float32)
    found = gated(torch.from_numpy(codes), torch.from_numpy(slots), tables, None).numpy()
    for token, slot in enumerate(slots):
        expected = codes[:, token] * expected_factors(codes[:, token], tables, slot)
        np.testing.assert_allclose(found[:, token], expected, rtol=1e-5, atol=2e-6)
        if slot in (-1, 1):
            np.testing.assert_array_equal(found[:, token], codes[:, token])


def test_rows_that_vllm_has_not_written_are_of_no_adapter():
    """Padded tokens of a captured graph have whatever was in memory."""
    codes = torch.randn(SLICES, 3, RANK)
    slots = torch.tensor([3, 2**62, -(2**62)])
    assert torch.equal(gated(codes, slots, filled(), None), codes)


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_parts_of_the_formula_that_a_rule_does_not_need_change_nothing(number):
    adapter, units, biases = batch(7)
    mine = adapter == number
    arguments = torch.from_numpy(units[mine]), rows(adapter, biases)[mine]
    assert torch.equal(gates(*arguments, rule_of(CONFIGS[number]).parts), gates(*arguments))


@pytest.mark.parametrize("number", range(len(CONFIGS)))
@pytest.mark.parametrize("slots", [[-1], [0, 0], [1, 1, -1], [2], [-1, 0, 1, 2, 0, -1, 2, 7, 1]], ids=str)
def test_one_adapter_after_the_other_is_the_same(slots, number):
    tables, slots = Tables(SLICES, SLOTS, 64, 3), torch.tensor(slots)
    mixture = [Gating(rule_of(CONFIGS[n]), (), (1,) * CONFIGS[n].num_experts) for n in (number, number - 1)]
    tables.fill(0, mixture)
    tables.fill(2, mixture[::-1])
    codes = torch.randn(SLICES, len(slots), 64)
    found, expected = gated_by_adapter(codes.clone(), slots, tables), gated(codes, slots, tables)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_slot_that_is_filled_again_forgets():
    tables, codes = filled(), torch.randn(SLICES, 4, RANK)
    where = [t.data_ptr() for t in (tables.rules, tables.owners)]
    tables.fill(0, [Gating()] * SLICES)
    slots = torch.zeros(4, dtype=torch.long)
    assert torch.equal(gated(codes, slots, tables, None), codes)
    assert where == [t.data_ptr() for t in (tables.rules, tables.owners)]  # a captured graph reads these


def test_logits_are_summed_over_processes_before_the_gates():
    """Each of two processes has a part of x, so a part of A x; together they must gate as one."""
    tables, slots = filled(), torch.zeros(5, dtype=torch.long)
    halves = torch.randn(2, SLICES, 5, RANK)
    seen = []
    other = [gated(half, slots, tables, lambda u: seen.append(u) or u) for half in halves]
    assert len(other) == len(seen) == 2
    parts = [gated(half, slots, tables, lambda _: seen[0] + seen[1]) for half in halves]
    whole = gated(halves.sum(0), slots, tables, None)
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rank", "parts", "units"), [(8, 1, 4), (16, 3, 4), (64, 1, 32), (512, 3, 32), (1, 3, 1)])
def test_as_many_units_as_the_rank_has_room_for(rank, parts, units):
    assert units_of(rank, parts) == units


def test_the_whole_layer_compiles_as_one_graph():
    torch._dynamo.reset()
    tables = filled()
    layer = torch.compile(functools.partial(gated, tables=tables, over_processes=None), fullgraph=True, backend="eager")
    codes, slots = torch.randn(SLICES, 6, RANK), torch.tensor([-1, 0, 1, 2, 0, -1])
    assert torch.equal(layer(codes, slots), gated(codes, slots, tables, None))
    tables.fill(1, [Gating(rule_of(CONFIGS[0]), (), (2,) * 4)] * SLICES)
    assert torch.equal(layer(codes, slots), gated(codes, slots, tables, None))
    assert not torch.equal(layer(codes, slots)[:, 2], codes[:, 2])


def test_every_field_of_a_rule_is_in_the_row():
    row = rule_of(CONFIGS[6]).row([1.0] * 7, UNITS)
    assert len(row) == len(FIELDS) + UNITS
    assert dict(zip(FIELDS, row, strict=False))["adaptive_bias"] == 0.25
