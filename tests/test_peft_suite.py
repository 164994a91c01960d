"""A handful of PEFT's own tests; `make peft-suite` runs all of them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import peft_suite

CHOSEN = [
    "test_save_pretrained",
    "test_load_multiple_adapters",
    "test_disable_adapters",
    "test_safe_merge",
    "test_adding_multiple_adapters_with_bias_raises",
    "test_mixed_adapter_batches",
    "test_gpt2_dora_merge_and_unload",
]


@pytest.fixture(scope="module")
def results():
    try:
        tests = peft_suite.download()
    except peft_suite.Unreachable as error:
        pytest.skip(f"PEFT's tests are only in its source distribution, and PyPI cannot be reached: {error}")
    return peft_suite.run(tests, ["-n", "0", "-k", " or ".join(CHOSEN)], quick=True)


def kinds(results: dict[str, tuple[str, str]], name: str) -> set[str]:
    return {kind for test, (kind, _) in results.items() if f"::{name}[" in test or test.endswith(f"::{name}")}


def test_nothing_fails(results):
    assert [(test, reason) for test, (kind, reason) in results.items() if kind == "failed"] == []
    assert len(results) > 40


def test_what_a_mixture_can_do_passes(results):
    for name in CHOSEN[:3]:
        assert kinds(results, name) == {"passed"}, name
    decoder = {t: kind for t, (kind, _) in results.items() if "decoder" in t and "test_mixed_adapter_batches" in t}
    assert set(decoder.values()) == {"passed"}


def test_what_it_cannot_is_counted_as_refused_not_as_passed(results):
    assert kinds(results, "test_safe_merge") == {"refused"}
    assert {r for t, (_, r) in results.items() if "test_safe_merge" in t} == {"merging"}
    assert kinds(results, "test_adding_multiple_adapters_with_bias_raises") == {"refused"}
    assert kinds(results, "test_gpt2_dora_merge_and_unload") == {"not ours"}


def test_the_table(results):
    table = peft_suite.summary(results)
    assert "refused by design:" in table and "merging" in table
    assert "FAILED" not in table
    broken = peft_suite.summary(results | {"tests/test_x.py::test_y": ("failed", "assert 1 == 2")})
    assert broken.endswith("FAILED tests/test_x.py::test_y")
