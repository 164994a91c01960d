"""Rules have no direction: whatever is encoded decodes to the same bits, and whatever does not fit is named."""

import itertools

import ml_dtypes  # noqa: F401
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lora_interop.dialects import FILE_DIALECTS
from moe_lora_interop.rules.tensors import Rule, claim, decode, encode
from moe_lora_jax.adapters.jax_tree import JAX_TREE
from tests.adapters import assert_same_tensors, random_bits

STACKED = Rule("lora_A", "base_model.model.{module}.moe_lora_A", "expert rank in")
PER_EXPERT = Rule("lora_A", "base_model.model.{module}.lora_A{expert}.weight", "rank in")
PER_EXPERT_B = Rule("lora_B", "base_model.model.{module}.lora_B{expert}.weight", "out rank")
JOINED = Rule("lora_A", "{module}.lora_A.weight", "(expert rank) in")
JOINED_B = Rule("lora_B", "{module}.lora_B.weight", "out (expert rank)")
TRANSPOSED = Rule("lora_A", "{module}.lora_a", "in rank expert")
SHARED = Rule("lora_A", "{module}.shared_A", "rank in")
IN_FOLDERS = Rule("lora_A", "{expert}/{module}.lora_A.weight", "rank in")
LAYERED = Rule("lora_A", "layers.{path}.lora_A", "layer expert rank in", module="model.layers.{layer}.{path}")

A = np.arange(2 * 3 * 4, dtype="float32").reshape(2, 3, 4)  # expert rank in
B = np.arange(2 * 5 * 3, dtype="float32").reshape(2, 5, 3)  # expert out rank


def sizes_of(experts=2, ranks=(3, 3), **more):
    return lambda module: {"expert": experts, "rank": ranks, **more}


def stored_as(rules, canonical, sizes=None):
    stored, problems = encode(rules, canonical, sizes or sizes_of())
    assert problems == []
    return stored


def read_back(rules, stored, sizes=None):
    canonical, problems = decode(rules, stored, sizes or sizes_of())
    assert problems == []
    return canonical


def problems_of(function, rules, tensors, sizes=None):
    _, problems = function(rules, tensors, sizes or sizes_of())
    return problems


# --- each way of storing, with the stored tensors written out -------------------------------------------------------

LAYOUTS = {
    "one_stacked_tensor": (STACKED, {("m.q", "lora_A"): A}, {"base_model.model.m.q.moe_lora_A": A}),
    "one_tensor_per_expert": (
        PER_EXPERT,
        {("m.q", "lora_A"): A},
        {"base_model.model.m.q.lora_A0.weight": A[0], "base_model.model.m.q.lora_A1.weight": A[1]},
    ),
    "joined_along_the_rank": (JOINED, {("m.q", "lora_A"): A}, {"m.q.lora_A.weight": np.concatenate([A[0], A[1]])}),
    "joined_in_the_last_axis": (
        JOINED_B,
        {("m.q", "lora_B"): B},
        {"m.q.lora_B.weight": np.concatenate([B[0], B[1]], axis=1)},
    ),
    "transposed": (TRANSPOSED, {("m.q", "lora_A"): A}, {"m.q.lora_a": A.transpose(2, 1, 0)}),
    "folders": (IN_FOLDERS, {("m.q", "lora_A"): A}, {"0/m.q.lora_A.weight": A[0], "1/m.q.lora_A.weight": A[1]}),
    "layers_stacked": (
        LAYERED,
        {("model.layers.0.q", "lora_A"): A, ("model.layers.1.q", "lora_A"): A + 100},
        {"layers.q.lora_A": np.stack([A, A + 100])},
    ),
    "split_axis": (
        Rule("lora_A", "{module}.poly", "split expert in rank", canonical_axes="expert rank (split in)"),
        {("m.q", "lora_A"): A},
        {"m.q.poly": np.stack([A[:, :, :2].transpose(0, 2, 1), A[:, :, 2:].transpose(0, 2, 1)])},
    ),
    "an_axis_of_size_one": (
        Rule("threshold", "{module}.threshold.weight", "one in"),
        {("m.q", "threshold"): A[0, 0]},
        {"m.q.threshold.weight": A[0, :1]},
    ),
    "a_scalar": (
        Rule("threshold_bias", "{module}.bias", ""),
        {("m.q", "threshold_bias"): A[0, 0, 0]},
        {"m.q.bias": A[0, 0, 0]},
    ),
    "numbers_with_gaps": (
        Rule("router_{j}", "layers.{j*3}.weight", "unit in", module=""),
        {("", "router_0"): A[0], ("", "router_2"): A[1]},
        {"layers.0.weight": A[0], "layers.6.weight": A[1]},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_stores_what_it_says_and_reads_it_back(name):
    rule, canonical, stored = LAYOUTS[name]
    canonical = {slot: np.asarray(tensor) for slot, tensor in canonical.items()}
    stored = {key: np.asarray(tensor) for key, tensor in stored.items()}
    sizes = sizes_of(split=2)
    assert_same_tensors(stored_as([rule], canonical, sizes), stored)
    assert_same_tensors(read_back([rule], stored, sizes), canonical)


def test_a_shared_a_has_no_expert_axis_in_the_file_and_size_one_in_memory():
    shared = {("m", "lora_A"): A[:1]}
    assert_same_tensors(stored_as([SHARED], shared), {"m.shared_A": A[0]})
    assert_same_tensors(read_back([SHARED], {"m.shared_A": A[0]}), shared)


def test_experts_of_smaller_rank_are_cut_in_the_file_and_padded_in_memory():
    sizes = sizes_of(3, (1, 3, 2))
    a, b = np.ones((3, 3, 4), "float32"), np.ones((3, 5, 3), "float32")
    for expert, rank in enumerate((1, 3, 2)):
        a[expert, rank:], b[expert, :, rank:] = 0, 0
    canonical = {("m", "lora_A"): a, ("m", "lora_B"): b}
    stored = stored_as([PER_EXPERT, PER_EXPERT_B], canonical, sizes)
    prefix = "base_model.model.m"
    assert {n: t.shape for n, t in stored.items()} == {
        **{f"{prefix}.lora_A{e}.weight": (r, 4) for e, r in enumerate((1, 3, 2))},
        **{f"{prefix}.lora_B{e}.weight": (5, r) for e, r in enumerate((1, 3, 2))},
    }
    assert all(t.all() for t in stored.values())
    assert_same_tensors(read_back([PER_EXPERT, PER_EXPERT_B], stored, sizes), canonical)


def test_ten_experts_are_in_the_order_of_their_numbers():
    a = np.arange(12, dtype="float32").reshape(12, 1, 1)
    sizes = sizes_of(12, (1,) * 12)
    stored = stored_as([PER_EXPERT], {("m", "lora_A"): a}, sizes)
    assert stored["base_model.model.m.lora_A10.weight"].item() == 10
    assert_same_tensors(read_back([PER_EXPERT], dict(sorted(stored.items())), sizes), {("m", "lora_A"): a})


def test_the_most_specific_rule_wins():
    loose = Rule("lora_A", "{module}.lora_A.weight", "rank in")
    tight = Rule("lora_A", "{module}.experts.{expert}.lora_A.weight", "rank in")
    for rules in ([loose, tight], [tight, loose]):
        assert claim(rules, "m.experts.0.lora_A.weight", 2) is tight
        assert claim(rules, "m.lora_A.weight", 2) is loose
        assert claim(rules, "m.lora_A.weight", 3) is None
        assert claim(rules, "m.lora_B.weight", 2) is None


def test_plain_and_stacked_trees_differ_in_their_axes_only():
    plain = Rule("lora_A", "{module}.w", "expert rank in")
    layered = Rule("lora_A", "{path}.w", "layer expert rank in", module="model.{layer}.{path}")
    assert claim([plain, layered], "m.w", 3) is plain
    assert claim([plain, layered], "m.w", 4) is layered


def test_duplicates_are_compared_bit_by_bit_and_written_on_request_only():
    rules = [STACKED, Rule("lora_A", "{module}.twin", "expert rank in", copy="same")]
    stored, problems = encode(rules, {("m", "lora_A"): A}, sizes_of())
    assert (set(stored), problems) == ({"base_model.model.m.moe_lora_A"}, [])
    stored, problems = encode(rules, {("m", "lora_A"): A}, sizes_of(), duplicates=True)
    assert (set(stored), problems) == ({"base_model.model.m.moe_lora_A", "m.twin"}, [])
    assert_same_tensors(read_back(rules, stored), {("m", "lora_A"): A})
    zero = {name: np.zeros_like(A) for name in stored}
    zero["m.twin"] = -zero["m.twin"]  # equal as numbers, not as bits
    (problem,) = problems_of(decode, rules, zero)
    assert "m" in problem and "differs" in problem


def test_dead_tensors_are_ignored_and_never_written():
    rules = [STACKED, Rule("router", "{module}.dead", "logit in", copy="dead")]
    stored = {"base_model.model.m.moe_lora_A": A, "m.dead": np.ones((2, 4), "float32")}
    assert_same_tensors(read_back(rules, stored), {("m", "lora_A"): A})
    assert problems_of(encode, rules, {("m", "router"): stored["m.dead"]}) != []


# --- what does not fit is named -------------------------------------------------------------------------------------


def experts(*numbers, shape=(3, 4), dtype="float32"):
    return {f"base_model.model.m.lora_A{n}.weight": np.ones(shape, dtype) for n in numbers}


@pytest.mark.parametrize("present", [(0, 2), (1, 2), (0, 1), ()], ids=str)
def test_missing_experts_are_named(present):
    other = {"base_model.model.other.lora_A0.weight": np.ones((3, 4), "float32")}
    problems = problems_of(decode, [PER_EXPERT], {**experts(*present), **other}, sizes_of(3, (3, 3, 3)))
    missing = {f"base_model.model.m.lora_A{n}.weight: missing tensor" for n in {0, 1, 2} - set(present)}
    found = {p for p in problems if ".m." in p}
    assert found == (missing if present else set())  # a module that is not there at all is the config's business
    assert {p for p in problems if ".other." in p} == {
        f"base_model.model.other.lora_A{n}.weight: missing tensor" for n in (1, 2)
    }


def test_an_expert_too_many_is_named():
    (problem,) = problems_of(decode, [PER_EXPERT], experts(0, 1, 2))
    assert problem.startswith("base_model.model.m.lora_A2.weight: unexpected tensor")


@pytest.mark.parametrize("number", [999_999_999, 2_000_000])
def test_a_hostile_expert_number_allocates_nothing(number):
    stored = experts(0, number)
    for sizes in (sizes_of(), lambda module: {}):
        assert all("base_model.model.m.lora_A" in p for p in problems_of(decode, [PER_EXPERT], stored, sizes))
        assert problems_of(decode, [PER_EXPERT], stored, sizes)


@pytest.mark.parametrize("number", ["01", "+1", "1١", "1_0", "1" * 30])
def test_other_spellings_of_a_number_are_no_experts(number):
    key = f"base_model.model.m.lora_A{number}.weight"
    (problem,) = problems_of(decode, [PER_EXPERT], {**experts(0, 1), key: np.ones((3, 4), "float32")})
    assert problem.startswith(f"{key} [3, 4]: unexpected tensor")


def test_unexpected_keys_and_numbers_of_axes_are_named_with_their_shapes():
    stored = {"base_model.model.m.moe_lora_A": A[0], "x": A, "base_model.model.m.moe_lora_A.bias": A}
    problems = problems_of(decode, [STACKED], stored)
    assert {p.split(":")[0] for p in problems} == {f"{name} {list(t.shape)}" for name, t in stored.items()}


def test_mixed_dtypes_of_experts_are_named_and_not_promoted():
    stored = {**experts(0), **experts(1, dtype="float16")}
    (problem,) = problems_of(decode, [PER_EXPERT], stored)
    assert problem.startswith("base_model.model.m.lora_A0.weight") and "float16" in problem and "float32" in problem


def test_an_expert_of_another_size_is_named():
    stored = {**experts(0, 1), **experts(2, shape=(3, 5))}
    problems = problems_of(decode, [PER_EXPERT], stored, sizes_of(3, (3, 3, 3)))
    assert len(problems) == 1 and "base_model.model.m.lora_A" in problems[0]
    assert "[3, 4]" in problems[0] and "[3, 5]" in problems[0]


@pytest.mark.parametrize("found", [(2, 4), (4, 3), (4, 4)], ids=str)
def test_experts_whose_ranks_are_not_the_configs_are_named(found):
    stored = {**experts(0, shape=(found[0], 7)), **experts(1, shape=(found[1], 7))}
    problems = problems_of(decode, [PER_EXPERT], stored, sizes_of(2, (4, 2)))
    assert problems and all("base_model.model.m.lora_A" in p for p in problems)


def test_a_joined_axis_that_does_not_divide_is_named():
    (problem,) = problems_of(decode, [JOINED], {"m.lora_A.weight": np.ones((7, 4), "float32")})
    assert problem.startswith("m.lora_A.weight") and "expert rank" in problem and "7" in problem
    (problem,) = problems_of(decode, [JOINED], {"m.lora_A.weight": np.ones((0, 4), "float32")})
    assert problem.startswith("m.lora_A.weight")


def test_an_axis_of_size_two_where_the_layout_holds_one_is_named():
    (problem,) = problems_of(encode, [SHARED], {("m", "lora_A"): A})
    assert "m" in problem and "'expert'" in problem and "size 2" in problem and "only 1" in problem
    rule = Rule("threshold", "{module}.threshold", "one in")
    (problem,) = problems_of(decode, [rule], {"m.threshold": np.ones((2, 4), "float32")})
    assert problem.startswith("m.threshold") and "'one'" in problem and "size 2" in problem


def test_a_shared_a_does_not_become_the_first_experts():
    (problem,) = problems_of(encode, [PER_EXPERT], {("m", "lora_A"): A[:1]})
    assert "1 expert" in problem and "2" in problem
    assert problems_of(encode, [JOINED], {("m", "lora_A"): A[:1]})  # it could not be read back either


def test_values_beyond_an_experts_rank_are_not_dropped_in_silence():
    problems = problems_of(encode, [PER_EXPERT], {("m", "lora_A"): A + 1}, sizes_of(2, (3, 1)))
    assert problems and "m" in problems[0]


def test_a_role_without_a_place_is_named():
    problems = problems_of(encode, [STACKED], {("m", "router"): A[0], ("", "task_embedding"): A[0]})
    assert len(problems) == 2 and all("no place" in p for p in problems)
    assert problems[0].startswith("m router")


def test_tensors_stored_twice_under_different_names_are_named():
    twice = [Rule("lora_A", "{module}.a", "expert rank in"), Rule("lora_A", "{module}.b", "expert rank in")]
    (problem,) = problems_of(decode, twice, {"m.a": A, "m.b": A})
    assert "m lora_A" in problem and "twice" in problem


def test_all_problems_are_collected():
    stored = {**experts(0), "x": A, "base_model.model.n.lora_A7.weight": A[0]}
    problems = "\n".join(problems_of(decode, [PER_EXPERT], stored))
    assert all(word in problems for word in ("m.lora_A1.weight: missing", "x [2, 3, 4]", "n.lora_A7.weight"))


# --- every known layout ---------------------------------------------------------------------------------------------

XLORA = {"xlora_depth": 4}  # more layers than are drawn, so that the last one is none of them
DIALECTS = {d.name: d for d in (*FILE_DIALECTS, JAX_TREE)}
NAMES = ["q", "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up", "é", "a b", "x{y}", "a|b", "0", "lora_A"]


@st.composite
def adapters(draw, rules):
    """Tensors for every role that the rules have a place for, any bits in any dtype, and the sizes behind them."""
    seed, splits = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 2))
    rng = np.random.default_rng(seed)
    stored_rules = [r for r in rules if r.copy == ""]
    fewest = 2 if any(r.lacks_experts for r in stored_rules) else 1  # one expert alone is stored as plain LoRA there
    with_experts = {r.role for r in stored_rules if not r.lacks_experts}
    pools = {
        "module": draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)),
        "path": draw(st.lists(st.sampled_from(["mlp.up_proj", "mlp.down", "x"]), min_size=1, max_size=2, unique=True)),
        "layer": draw(st.lists(st.integers(0, 12), min_size=1, max_size=3, unique=True)),
        "j": range(draw(st.integers(1, 3))),
    }
    stackable = all(("expert",) in r.stored.shape for r in stored_rules if r.role == "lora_A")
    shared = stackable and draw(st.booleans())
    modules, tensors, of_width, count = {}, {}, {}, 0
    for rule in stored_rules:
        plain = rule.lacks_experts and rule.role in with_experts
        fields = rule.canonical.fields
        for values in itertools.product(*(pools[f] for f in fields)):
            bound = dict(zip(fields, values, strict=True))
            for free in {"module", "path"} & bound.keys() if plain else ():
                bound[free] = f"plain.{bound[free]}"
            module, role = rule.canonical.format(bound).rsplit("|", 1)
            if module not in modules:
                n = 1 if plain or not with_experts else draw(st.integers(fewest, 4))
                ranks = draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
                if shared or splits > 1:
                    ranks = [ranks[0]] * n
                modules[module] = {"expert": n, "rank": tuple(ranks), "split": splits}
            known = modules[module]
            size = {"expert": known["expert"], "rank": max(known["rank"]), "split": splits, "one": 1}
            if role == "lora_A" and (shared or rule.lacks_experts):
                size["expert"] = 1
            shape = []
            for axes in rule.canonical.shape:
                parts = [size[a] if a in size else int(rng.integers(1, 5)) for a in axes]
                shape.append(int(np.prod(parts, dtype=int)))
            tensor = random_bits(rng, tuple(shape), draw(st.sampled_from(["float32", "bfloat16", "float16"]))).copy()
            if role in ("lora_A", "lora_B") and size["expert"] == known["expert"]:
                for expert, own in enumerate(known["rank"]):
                    tensor[
                        (expert, slice(own, None)) if role == "lora_A" else (expert, slice(None), slice(own, None))
                    ] = 0
            if "width" in rule.stored.fields:  # one for all modules with so many inputs
                tensor = of_width.setdefault((role, tensors[module, "lora_A"].shape[-1]), tensor)
            tensors[module, role] = tensor
            count += known["expert"] if "expert" in rule.stored.fields else 1
    return tensors, modules, count


@pytest.mark.parametrize("name", [name for name, dialect in DIALECTS.items() if not dialect.read_only])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_layout_gives_back_the_same_bits(name, data):
    rules = DIALECTS[name].specialised({**XLORA, "xlora_dropout_p": data.draw(st.sampled_from([0.0, 0.1]))}).rules
    canonical, modules, count = data.draw(adapters(rules))
    sizes = modules.__getitem__
    stored, problems = encode(rules, canonical, sizes)
    assert problems == []
    own = [name for name, tensor in stored.items() if claim(rules, name, tensor.ndim).copy != "stale"]
    assert len(own) == count  # no two tensors under one name
    before = {key: (tensor.shape, tensor.tobytes()) for key, tensor in canonical.items()}
    back, problems = decode(rules, dict(reversed(stored.items())), sizes)
    assert problems == []
    assert_same_tensors(back, canonical)
    assert {key: (tensor.shape, tensor.tobytes()) for key, tensor in canonical.items()} == before


@pytest.mark.parametrize("name", DIALECTS)
def test_every_layout_says_where_it_comes_from_and_names_its_rules_once(name):
    dialect = DIALECTS[name]
    assert dialect.name == name and dialect.source
    assert len({(r.key, len(r.stored.shape)) for r in dialect.rules}) == len(dialect.rules)
    assert {r.role for r in dialect.rules if r.copy == ""} >= dialect.needs
