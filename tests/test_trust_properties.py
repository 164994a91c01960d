"""Random configs, sizes and values through files, trees and both frameworks: what comes back is what went in, exactly.

Random tensors in one layout are in test_rules, configs in JSON in test_config, every layout into every other in
test_matrix; here the config of each layout is random too, and everything goes through files.
"""

import contextlib
import re
import tempfile
import time

import jax
import ml_dtypes
import numpy as np
import pytest
import regex
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_lora_interop
import moe_lora_jax as mlj
from moe_lora_interop.config.patterns import first_match, match_start, matches, pattern_for
from moe_lora_interop.dialects.registry import dialect_named
from moe_lora_interop.disk.npz import read_npz, write_npz
from moe_lora_interop.rules.configs import options_of
from tests.adapters import assert_same_tensors
from tools.samples import SAMPLES, random_adapter_for

DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
# what a layout's sample leaves open: fields that it can express with any value, with values that go together
FREE = {
    "r": st.integers(1, 4),
    "num_experts": st.sampled_from([2, 4, 6]),  # even, for the localized loss
    "lora_alpha": st.integers(1, 64),
    "lora_dropout": st.sampled_from([0.0, 0.1, 0.5]),
}
FIXED = {  # because lists in the sample have one entry per expert, or patterns depend on them
    "native": ("r", "num_experts"),
    "arrow": ("r", "num_experts", "lora_alpha"),
    "xlora": ("r", "num_experts"),
    "xlora-original": ("r", "num_experts", "lora_alpha"),
    "ewora": ("r", "lora_alpha"),
    "meteora": ("num_experts", "lora_alpha"),
    "mola": ("r", "num_experts"),
    "lora": ("num_experts",),
    "poly": ("lora_alpha", "lora_dropout"),
    "for-ai-molora": ("lora_alpha", "lora_dropout"),
    "peft-router": ("num_experts",),
}


@st.composite
def adapters(draw, layout):
    """A random adapter that the layout can hold."""
    preset, fields, kinds = SAMPLES[layout]
    layers = draw(st.integers(1, 3) if layout != "mola" else st.just(2))
    modules = [f"model.layers.{n}.{kind}" for n in range(layers) for kind in kinds]
    values = {"r": 2, "num_experts": 4, "lora_alpha": 4, **fields, "target_modules": modules}
    values |= {name: draw(values_of) for name, values_of in FREE.items() if name not in FIXED.get(layout, ())}
    if values["num_experts"] < 3 and values.get("top_k", 0) > 2:
        values["top_k"] = 2
    config = (
        moe_lora_interop.MoeLoraConfig.preset(preset, **values) if preset else moe_lora_interop.MoeLoraConfig(**values)
    )
    adapter = random_adapter_for(layout, config, modules, seed=draw(st.integers(0, 2**32 - 1)))
    dtype = np.dtype(draw(DTYPES))
    return moe_lora_interop.Adapter(adapter.config, {slot: t.astype(dtype) for slot, t in adapter.tensors.items()})


@pytest.mark.parametrize("layout", SAMPLES)
def test_every_layout_gives_back_what_was_written(layout, tries, tally):
    done = []

    @settings(max_examples=tries(6, 300), deadline=None, database=None, derandomize=True)
    @given(adapters(layout))
    def round_trip(adapter):
        try:
            with tempfile.TemporaryDirectory() as directory:
                moe_lora_interop.write(adapter, directory, layout)
                options = (
                    {} if layout == "native" else options_of(dialect_named(layout), adapter.config, adapter.modules)
                )
                back = moe_lora_interop.read(directory, layout, **options)
        except moe_lora_interop.ConfigError as error:  # said, and not lost
            assert error.problems
            refused.append(error)
            return
        assert back.config.resolved(back.modules) == adapter.config.resolved(adapter.modules)
        assert_same_tensors(back.tensors, adapter.tensors)
        done.append(1)

    refused: list[moe_lora_interop.ConfigError] = []
    round_trip()
    assert len(done) > len(refused), refused[0]
    tally("round trips", tried=len(done), lost=0)


# --- JAX and PyTorch --------------------------------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self):
        self.q = nnx.Linear(6, 5, use_bias=False, rngs=nnx.Rngs(0))
        self.v = nnx.Linear(6, 3, use_bias=False, rngs=nnx.Rngs(1))


CONFIGS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 9),
        "num_experts": st.integers(1, 6),
        "lora_alpha": st.floats(0.5, 64),
        "use_rslora": st.booleans(),
        "router_bias": st.booleans(),
        "shared_lora_A": st.booleans(),
        "scoring_func": st.sampled_from(["softmax", "abs_softmax", "sigmoid"]),
        "router_temperature": st.floats(0.1, 10),
        "rank_pattern": st.sampled_from([{}, {"v": 3}]),
        "num_experts_pattern": st.sampled_from([{}, {"q": 1}, {"v": 2}]),
    }
)


def test_trees_files_and_peft_hold_the_same_bits(tries, tally):
    """JAX -> file -> JAX, and JAX -> file -> PEFT -> file: every tensor and the config."""
    import torch
    from peft import PeftModel

    import moe_lora_interop.peft_tuner  # noqa: F401

    class TorchModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v = torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(6, 3, bias=False)

        def forward(self, x):
            return self.q(x)

    count = tries(6, 200)

    @settings(max_examples=count, deadline=None, database=None, derandomize=True)
    @given(CONFIGS, st.integers(0, 2**32 - 1))
    def round_trip(fields, seed):
        model, again = Model(), Model()
        mlj.apply_moe_lora(model, moe_lora_interop.MoeLoraConfig(target_modules=["q", "v"], **fields), rngs=nnx.Rngs(0))
        rng = np.random.default_rng(seed)
        state = nnx.state(model, mlj.MoeLoraParam)
        bits = jax.tree.map(lambda v: rng.standard_normal(v.shape).astype(v.dtype), state)
        nnx.update(model, bits)
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            mlj.save_pretrained(model, first)
            written = moe_lora_interop.read(first)
            mlj.load_adapter(again, first)
            for one, other in zip(
                jax.tree.leaves(bits), jax.tree.leaves(nnx.state(again, mlj.MoeLoraParam)), strict=True
            ):
                assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
            PeftModel.from_pretrained(TorchModel(), first).save_pretrained(second)
            back = moe_lora_interop.read(second)
        assert back.config.resolved(back.modules) == written.config.resolved(written.modules)
        assert_same_tensors(back.tensors, written.tensors)

    round_trip()
    tally("round trips", tried=2 * count, lost=0)


# --- patterns ---------------------------------------------------------------------------------------------------------

PARTS = ["q_proj", ".*", r"\.", "layers", "0", "[0-9]+", "(a|b)", "x?", "^", "$", r"\d", "mlp", "(?!q)", "+"]
PATTERNS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map("".join)
NAMES = ["layers", "0", "12", "q_proj", "mlp", "a", "b", "é"]
PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=6).map(".".join)


def test_patterns_mean_what_they_mean_in_re(tries, tally):
    """`config.patterns` matches with the package `regex`, which has a time limit; PEFT matches with `re`."""
    count = tries(300, 20_000)

    @settings(max_examples=count, deadline=None, database=None, derandomize=True)
    @given(PATTERNS, PATHS)
    def agree(pattern, path):
        try:
            re.compile(pattern)
            regex.compile(pattern)
        except (re.error, regex.error):
            return
        assert matches(pattern, path) == (re.fullmatch(pattern, path) is not None)
        ours, theirs = match_start(pattern, path), re.match(pattern, path)
        assert (ours and ours.span()) == (theirs and theirs.span())

    agree()
    tally("patterns", tried=count, lost=0)


def test_pattern_for_gives_every_module_its_value(tries, tally):
    count = tries(100, 3000)

    @settings(max_examples=count, deadline=None, database=None, derandomize=True)
    @given(st.dictionaries(PATHS, st.integers(1, 3), min_size=1, max_size=12), st.integers(1, 3))
    def every_one(values, default):
        pattern = pattern_for(values, default)
        for order in (1, -1):
            ordered = dict(list(pattern.items())[::order])
            assert {m: first_match(ordered, m, default) for m in values} == values

    every_one()
    tally("patterns", tried=count, lost=0)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(.*)*b", ".*" * 20 + "!$b", "(a|aa)+$x"])
def test_a_pattern_that_backtracks_for_ever_ends(pattern, tally):
    """The package `regex` sees at once that some of them cannot match."""
    start = time.process_time()
    for text in ("a" * 500, "a" * 500 + "!b!"):
        with contextlib.suppress(moe_lora_interop.ConfigError):
            assert not matches(pattern, text)
    assert time.process_time() - start < 2
    tally("patterns", tried=2, lost=0)


def test_a_pattern_without_a_result_in_time_is_named():
    with pytest.raises(moe_lora_interop.ConfigError, match=r"'\(a\|aa\)\+\$x': no result in 0.5 s on 'aaa"):
        matches("(a|aa)+$x", "a" * 500)


@pytest.mark.parametrize("name", ["file", "allow_pickle", "a.npy", "b"])
def test_prototypes_of_modules_with_any_name(name, tmp_path):
    write_npz(tmp_path / "p.npz", {name: np.ones((2, 3), "f4"), "other": np.zeros((1, 2), ml_dtypes.bfloat16)})
    assert_same_tensors(
        read_npz(tmp_path / "p.npz"), {name: np.ones((2, 3), "f4"), "other": np.zeros((1, 2), ml_dtypes.bfloat16)}
    )
