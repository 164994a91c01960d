"""Adapters on disk: bit-exact both ways, every damage noticed, every problem in one error."""

import copy
import json

import ml_dtypes  # noqa: F401
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moe_lora_interop
from moe_lora_interop import Adapter, CheckpointError, ConfigError, MoeLoraConfig
from moe_lora_interop.disk.files import write_tensors
from tests.adapters import Q0, Q1, SHAPES, V0, V1, assert_same_tensors, make_adapter, make_tensors, random_bits

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PREFIX = "base_model.model."
KINDS = {
    "plain": {},
    "top_k": dict(top_k=2),
    "bias": dict(router_bias=True),
    "adaptive": dict(threshold=0.5, adaptive_threshold=True),
    "shared_A": dict(shared_lora_A=True),
    "unequal_ranks": dict(r=[1, 4, 2], lora_alpha=[1, 2.5, 3]),
    "one_expert": dict(num_experts=1),
    "patterns": dict(num_experts_pattern={"v_proj": 1}, rank_pattern={r"layers\.0\..*": 3}),
    "pattern_of_lists": dict(rank_pattern={"v_proj": [3, 1, 2]}, alpha_pattern={"layers.1.self_attn.q_proj": 7}),
    "regex_target": dict(target_modules=r"model\.layers\..*_proj"),
    "all_linear": dict(target_modules="all-linear", base_model_name_or_path="some/base", task_type="CAUSAL_LM"),
}


@pytest.fixture
def saved(tmp_path):
    """A directory with a valid adapter, and the adapter."""
    adapter = make_adapter()
    moe_lora_interop.write(adapter, tmp_path)
    return tmp_path, adapter


def rewrite(directory, change_config=None, change_tensors=None):
    """Edits a saved adapter as another program would: the tensors rewritten without a digest."""
    tensors = load_file(directory / WEIGHTS)
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    if change_config:
        config = json.loads((directory / CONFIG).read_text())
        change_config(config)
        (directory / CONFIG).write_text(json.dumps(config))


def problems_of(call, *args, **kwargs):
    with pytest.raises((CheckpointError, ConfigError)) as error:
        call(*args, **kwargs)
    return error.value.problems


# --- round trip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_write_then_read_is_bit_exact(tmp_path, kind, dtype):
    adapter = make_adapter(dtype=dtype, draw=random_bits, **KINDS[kind])
    moe_lora_interop.write(adapter, tmp_path / "out")
    assert moe_lora_interop.detect(tmp_path / "out") == "native"
    back = moe_lora_interop.read(tmp_path / "out")
    assert back.config == adapter.config
    assert back.config.target_modules == sorted(SHAPES)
    assert_same_tensors(back.tensors, adapter.tensors)


def test_the_file_has_pefts_keys_and_axes(tmp_path):
    adapter = make_adapter(router_bias=True, threshold=0.5, adaptive_threshold=True)
    moe_lora_interop.write(adapter, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    expected = {}
    for m in SHAPES:
        expected[f"{PREFIX}{m}.moe_lora_A"] = adapter.tensors[m, "lora_A"]
        expected[f"{PREFIX}{m}.moe_lora_B"] = adapter.tensors[m, "lora_B"]
        expected[f"{PREFIX}{m}.moe_lora_router.weight"] = adapter.tensors[m, "router"]
        expected[f"{PREFIX}{m}.moe_lora_router.bias"] = adapter.tensors[m, "router_bias"]
        expected[f"{PREFIX}{m}.moe_lora_threshold.weight"] = adapter.tensors[m, "threshold"][None]
        expected[f"{PREFIX}{m}.moe_lora_threshold.bias"] = adapter.tensors[m, "threshold_bias"][None]
    assert_same_tensors(stored, expected)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["peft_type"], config["format_version"], config["target_modules"]) == ("MOE_LORA", 1, sorted(SHAPES))
    assert "base_model_name_or_path" in config and "task_type" in config


def test_writing_twice_gives_the_same_bytes(tmp_path):
    adapter = make_adapter(router_bias=True)
    moe_lora_interop.write(adapter, tmp_path / "a")
    reordered = Adapter(adapter.config, dict(reversed(adapter.tensors.items())))
    moe_lora_interop.write(reordered, tmp_path / "b")
    for name in (CONFIG, WEIGHTS, CARD):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("patterns", [{"q_proj": 2, ".*": 7}, {"v_proj": 1, "(q|v)_proj": 5, "layers.*": 9}], ids=str)
def test_the_order_of_patterns_survives_because_the_first_match_wins(tmp_path, patterns):
    adapter = make_adapter(alpha_pattern=patterns)
    moe_lora_interop.write(adapter, tmp_path)
    back = moe_lora_interop.read(tmp_path).config
    for module in SHAPES:
        assert back.for_module(module) == adapter.config.for_module(module)


def test_views_and_big_endian_arrays_keep_their_values(tmp_path):
    adapter = make_adapter()
    strange = dict(adapter.tensors)
    strange[Q0, "lora_A"] = strange[Q0, "lora_A"].transpose(2, 1, 0).copy().transpose(2, 1, 0)
    strange[Q0, "lora_B"] = np.repeat(strange[Q0, "lora_B"], 2, axis=0)[::2]
    strange[V0, "lora_A"], strange[V0, "lora_B"] = (strange[V0, r].astype(">f4") for r in ("lora_A", "lora_B"))
    moe_lora_interop.write(Adapter(adapter.config, strange), tmp_path)
    assert_same_tensors(moe_lora_interop.read(tmp_path).tensors, adapter.tensors)


def test_a_router_in_another_dtype_than_the_experts(tmp_path):
    config = MoeLoraConfig(r=2, num_experts=3, target_modules=["q_proj", "v_proj"])
    tensors = make_tensors(config, dtype="bfloat16", router_dtype="float32")
    moe_lora_interop.write(Adapter(config, tensors), tmp_path)
    assert_same_tensors(moe_lora_interop.read(tmp_path).tensors, tensors)


def test_reading_and_writing_change_no_argument(saved):
    directory, adapter = saved
    tensors, config = dict(adapter.tensors), adapter.config.to_dict()
    values = copy.deepcopy(tensors)
    moe_lora_interop.write(Adapter(adapter.config, tensors), directory)
    moe_lora_interop.read(directory)
    assert list(tensors) == list(values) and adapter.config.to_dict() == config
    assert_same_tensors(tensors, values)


def test_an_adapter_does_not_follow_changes_of_the_dict_it_was_made_from():
    config = make_adapter().config
    tensors = make_tensors(config)
    adapter = Adapter(config, tensors)
    del tensors[Q0, "lora_A"]
    assert (Q0, "lora_A") in adapter.tensors


# --- saving over something ------------------------------------------------------------------------------------------


def test_a_model_card_is_written_and_names_the_import(saved):
    text = (saved[0] / CARD).read_text()
    assert "import moe_lora_interop.peft_tuner" in text and "mlj.load_adapter" in text
    assert 'pip install "moe-lora-jax[torch]"' in text
    assert "12 tensors, 288 parameters, 1,152 bytes (F32)." in text
    assert "| `model.layers.*.self_attn.q_proj` | 2 | 3 | 5 | 6 | 2 |" in text


def test_a_users_readme_is_kept(tmp_path):
    (tmp_path / CARD).write_text("mine")
    moe_lora_interop.write(make_adapter(), tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"


def test_a_save_replaces_the_old_checkpoint_and_leaves_other_files(saved):
    directory, _ = saved
    (directory / "other").write_text("mine")
    new = make_adapter(seed=1, r=4, top_k=1)
    moe_lora_interop.write(new, directory)
    assert_same_tensors(moe_lora_interop.read(directory).tensors, new.tensors)
    assert {p.name for p in directory.iterdir()} == {CONFIG, WEIGHTS, CARD, "other"}


def test_a_failed_save_leaves_the_old_checkpoint_readable(saved, monkeypatch):
    directory, old = saved

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_lora_interop.disk.files.write_tensors", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        moe_lora_interop.write(make_adapter(seed=1, r=4), directory)
    monkeypatch.undo()
    assert_same_tensors(moe_lora_interop.read(directory).tensors, old.tensors)
    assert {p.name for p in directory.iterdir()} == {CONFIG, WEIGHTS, CARD}


def test_a_base_name_that_is_not_unicode_can_be_saved(tmp_path):
    adapter = make_adapter(base_model_name_or_path="base\udcff")  # as os.fsdecode gives it for a strange path
    moe_lora_interop.write(adapter, tmp_path)
    assert moe_lora_interop.read(tmp_path).config == adapter.config


def test_an_unknown_layout_lists_the_known_ones(saved):
    directory, adapter = saved
    for call in (
        lambda: moe_lora_interop.write(adapter, directory, "nativ"),
        lambda: moe_lora_interop.read(directory, "nativ"),
    ):
        with pytest.raises(CheckpointError, match="found 'nativ', expected one of.*native"):
            call()


# --- the digest -----------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_noticed(tmp_path):
    one = make_adapter(shapes={Q0: (3, 2)}, target_modules=[Q0], num_experts=2, r=1, dtype="bfloat16")
    moe_lora_interop.write(one, tmp_path)
    raw = (tmp_path / WEIGHTS).read_bytes()
    data = 8 * (8 + int.from_bytes(raw[:8], "little"))
    name = 8 * raw.index(b"digest")
    rng = np.random.default_rng(0)
    bits = {*rng.choice(data, 250, replace=False).tolist(), *rng.choice(range(data, 8 * len(raw)), 100).tolist()}
    bits |= set(range(name, name + 8 * len(b"digest")))  # without this word the file would have no digest
    unnoticed = []
    for bit in sorted(bits):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / WEIGHTS).write_bytes(flipped)
        try:
            moe_lora_interop.read(tmp_path, "native")
        except (CheckpointError, ConfigError):
            continue
        unnoticed.append(bytes(flipped[max(0, bit // 8 - 8) : bit // 8 + 8]))
    assert unnoticed == []


@pytest.mark.parametrize("fields", [dict(lora_alpha=32), dict(use_rslora=True), dict(top_k=1)], ids=str)
def test_another_checkpoints_config_is_noticed(saved, tmp_path, fields):
    directory, _ = saved
    moe_lora_interop.write(make_adapter(**fields), tmp_path / "other")
    (directory / CONFIG).write_bytes((tmp_path / "other" / CONFIG).read_bytes())
    with pytest.raises(CheckpointError, match="do not belong together.*\n.*digest"):
        moe_lora_interop.read(directory)


def test_another_checkpoints_tensors_are_noticed(saved, tmp_path):
    directory, _ = saved
    moe_lora_interop.write(make_adapter(lora_alpha=32), tmp_path / "other")
    (directory / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    with pytest.raises(CheckpointError, match="do not belong together"):
        moe_lora_interop.read(directory)


@pytest.mark.parametrize("change", [{"format": "np"}, {"format_version": "2"}, {"author": "me"}], ids=str)
def test_edited_metadata_are_noticed(saved, change):
    directory, _ = saved
    metadata = {**moe_lora_interop.inspect(directory).metadata, **change}
    save_file(load_file(directory / WEIGHTS), directory / WEIGHTS, metadata)
    with pytest.raises(CheckpointError, match="digest"):
        moe_lora_interop.read(directory)


def test_bookkeeping_may_be_edited_by_hand(saved):
    directory, adapter = saved
    config = json.loads((directory / CONFIG).read_text())
    config |= {"base_model_name_or_path": "elsewhere", "revision": "abc", "inference_mode": True, "peft_version": "9"}
    (directory / CONFIG).write_text(json.dumps(config))
    back = moe_lora_interop.read(directory)
    assert back.config.base_model_name_or_path == "elsewhere"
    assert_same_tensors(back.tensors, adapter.tensors)


def test_files_without_a_digest_are_accepted(saved):
    directory, adapter = saved
    rewrite(directory)
    assert_same_tensors(moe_lora_interop.read(directory).tensors, adapter.tensors)
    assert moe_lora_interop.read(directory).config == adapter.config


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_missing_extra_and_wrong_tensors_are_all_in_one_error(saved):
    directory, _ = saved

    def damage(tensors):
        del tensors[f"{PREFIX}{Q0}.moe_lora_A"]
        tensors[f"{PREFIX}{Q0}.moe_lora_router.bias"] = np.zeros(3, "float32")
        tensors[f"{PREFIX}{V0}.moe_lora_B"] = np.zeros((3, 3, 9), "float32")
        tensors[f"{PREFIX}{Q1}.moe_lora_router.weight"] = np.zeros((4, 5), "float32")
        tensors[f"{PREFIX}{V1}.moe_lora_A"] = tensors[f"{PREFIX}{V1}.moe_lora_A"].astype("float16")
        tensors["strange"] = np.zeros(2, "float32")
        tensors[f"{PREFIX}{V1}.moe_lora_router.weight"] = np.zeros(5, "float32")
        tensors[f"{PREFIX}model.norm.moe_lora_A"] = np.zeros((3, 2, 5), "float32")

    rewrite(directory, change_tensors=damage)
    problems = "\n".join(problems_of(moe_lora_interop.read, directory))
    for words in (
        [f"{Q0} lora_A", "missing"],
        [f"{Q0} router_bias", "unexpected"],
        [f"{V0} lora_B", "[3, 3, 9]", "found rank = 9", "expected 2"],
        [f"{Q1} router", "[4, 5]", "= 4", "expected 3"],
        [f"{V1}", "float16", "float32", "expected one dtype"],
        ["strange [2]", "unexpected"],
        [f"{V1}.moe_lora_router.weight [5]", "unexpected"],
        ["model.norm", "unexpected module"],
    ):
        assert any(all(w in line for w in words) for line in problems.splitlines()), (words, problems)


def test_in_and_out_sizes_must_agree_within_a_module():
    config, tensors = make_adapter().config, dict(make_adapter().tensors)
    tensors[Q0, "router"] = np.zeros((3, 4), "float32")
    (problem,) = problems_of(Adapter, config, tensors)
    assert all(w in problem for w in (f"{Q0} router", "[3, 4]", "found in = 4", "expected 5"))


@pytest.mark.parametrize("dtype", ["float64", "int32", "complex64", "bool"])
def test_dtypes_that_adapters_do_not_have_are_refused(dtype):
    config, tensors = make_adapter().config, dict(make_adapter().tensors)
    tensors[Q0, "router"] = tensors[Q0, "router"].astype(dtype)
    (problem,) = problems_of(Adapter, config, tensors)
    assert f"{Q0} router: dtype {dtype}, expected one of float32, bfloat16, float16" in problem


def test_a_missing_layer_is_named_although_targets_are_last_parts():
    config = MoeLoraConfig(r=2, num_experts=3, target_modules=["q_proj", "v_proj"])
    tensors = {k: t for k, t in make_tensors(config).items() if k[0] != Q1}
    (problem,) = problems_of(Adapter, config, tensors)
    assert problem.startswith(f"{Q1}: missing module")


def test_a_target_without_any_tensor_is_named(saved):
    directory, _ = saved
    rewrite(directory, change_config=lambda c: c.update(target_modules=["q_proj", "v_proj", "o_proj"]))
    (problem,) = problems_of(moe_lora_interop.read, directory)
    assert "o_proj" in problem


def test_a_missing_module_is_named_when_targets_are_full_paths(saved):
    directory, _ = saved

    def drop(tensors):
        for name in [n for n in tensors if Q1 in n]:
            del tensors[name]

    rewrite(directory, change_tensors=drop)
    (problem,) = problems_of(moe_lora_interop.read, directory)
    assert Q1 in problem


def test_a_config_that_fits_no_module_lists_all_of_them_and_the_tensors_too(saved):
    directory, _ = saved

    def damage(tensors):
        del tensors[f"{PREFIX}{V0}.moe_lora_A"]

    rewrite(directory, lambda c: c.update(rank_pattern={"q_proj": [1, 2]}), damage)
    problems = problems_of(moe_lora_interop.read, directory)
    for start in (f"{Q0}: r: found the list [1, 2]", f"{Q1}: r: found the list [1, 2]", f"{V0} lora_A: missing"):
        assert any(p.startswith(start) for p in problems), (start, problems)


@pytest.mark.parametrize("fields", [dict(num_experts=10**12), dict(r=10**12), dict(num_experts=2**70)], ids=str)
def test_hostile_sizes_in_the_config_are_an_error_and_no_allocation(saved, fields):
    directory, _ = saved
    rewrite(directory, change_config=lambda c: c.update(fields))
    assert problems_of(moe_lora_interop.read, directory)


def test_expert_counts_must_agree(saved):
    directory, _ = saved
    rewrite(directory, change_config=lambda c: c.update(num_experts=4))
    problems = problems_of(moe_lora_interop.read, directory)
    assert all(any(f"{m} {role}" in p for p in problems) for m in SHAPES for role in ("lora_A", "lora_B", "router"))


def test_one_expert_must_not_have_a_router(saved):
    directory, _ = saved
    rewrite(directory, change_config=lambda c: c.update(num_experts=1))
    assert any(f"{Q0} router" in p and "unexpected" in p for p in problems_of(moe_lora_interop.read, directory))


def test_padding_beyond_an_experts_rank_must_be_zero():
    config = make_adapter(r=[1, 2, 2]).config
    tensors = make_tensors(config)
    tensors[Q0, "lora_A"][0, 1, 3] = 1e-30  # computed with, but lost where experts are stored one by one
    (problem,) = problems_of(Adapter, config, tensors)
    assert f"{Q0} lora_A" in problem


def test_an_expert_whose_rank_is_not_its_configs_is_refused_in_any_layout(tmp_path):
    moe_lora_interop.write(make_adapter(scoring_func="abs_softmax", top_k=2), tmp_path, "arrow")
    path = tmp_path / "task_0" / WEIGHTS
    cut = {n: t[:1] if "lora_A" in n else t[:, :1].copy() for n, t in load_file(path).items()}
    save_file(cut, path)  # rank 1, and a config that says r = 2: alpha / r would be half of what it was
    assert any(Q0 in problem for problem in problems_of(moe_lora_interop.read, tmp_path))


def test_an_adapter_without_tensors_is_refused():
    assert problems_of(Adapter, make_adapter().config, {})


def test_a_newer_version_says_upgrade_before_anything_else(saved):
    directory, _ = saved
    rewrite(directory, lambda c: c.update(format_version=3, brand_new=1), lambda t: t.clear())
    with pytest.raises(ConfigError, match="upgrade moe-lora-jax"):
        moe_lora_interop.read(directory)


# --- what is no checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb", [moe_lora_interop.read, moe_lora_interop.detect, moe_lora_interop.inspect], ids=lambda v: v.__name__
)
def test_a_directory_that_is_no_checkpoint(tmp_path, verb):
    with pytest.raises(CheckpointError, match="not a checkpoint.*\n.*missing file"):
        verb(tmp_path)
    with pytest.raises(CheckpointError, match="found nothing, expected a directory"):
        verb(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="found a file, expected a directory"):
        verb(tmp_path / "file")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(saved, name):
    (saved[0] / name).unlink()
    with pytest.raises(CheckpointError, match=f"not a checkpoint.*\n.*{name}"):
        moe_lora_interop.read(saved[0])


def test_detect_refuses_what_no_layout_describes(saved):
    directory, _ = saved
    rewrite(directory, change_tensors=lambda t: t.update(classifier=np.zeros((2, 2), "float32")))
    with pytest.raises(CheckpointError, match="native: no rule for classifier"):
        moe_lora_interop.detect(directory)


def test_detect_refuses_an_empty_file(saved):
    write_tensors(saved[0] / WEIGHTS, {}, {})
    with pytest.raises(CheckpointError):
        moe_lora_interop.detect(saved[0])


def test_unknown_options_are_refused(saved):
    with pytest.raises(ConfigError) as error:
        moe_lora_interop.read(saved[0], alpha=2, beta=3)
    alpha, beta = error.value.problems
    assert "alpha" in alpha and "beta" in beta


# --- convert --------------------------------------------------------------------------------------------------------


def test_convert_to_native_gives_the_same_checkpoint(saved, tmp_path):
    directory, adapter = saved
    rewrite(directory)
    moe_lora_interop.convert(directory, tmp_path / "converted", to="native")
    back = moe_lora_interop.read(tmp_path / "converted")
    assert back.config == adapter.config
    assert_same_tensors(back.tensors, adapter.tensors)


def test_convert_can_write_over_its_source(saved):
    directory, adapter = saved
    moe_lora_interop.convert(directory, directory)
    assert_same_tensors(moe_lora_interop.read(directory).tensors, adapter.tensors)


def test_convert_refuses_a_damaged_source_and_writes_nothing(saved, tmp_path):
    directory, _ = saved
    rewrite(directory, change_tensors=lambda t: t.popitem())
    with pytest.raises(CheckpointError, match="missing"):
        moe_lora_interop.convert(directory, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
