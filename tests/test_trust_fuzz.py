"""The fuzz target of `make fuzz` with seeded random bytes, and with the inputs that have found a bug."""

import random

import pytest

from tools.fuzz import check, damaged, one_input, samples

FOUND = {
    "a .bin that torch refuses without a word": "e3e6b605b99e8306",
}


def test_random_bytes(tries, tally):
    numbers = random.Random(0)
    tried = tries(150, 10_000)
    for _ in range(tried):
        data = numbers.randbytes(numbers.choice([8, 16, 32, 64]))
        try:
            one_input(data)
        except Exception as error:
            pytest.fail(f"{data.hex()} ({damaged(data)[0]}): {type(error).__name__}: {error}")
    tally("random damage", tried=tried, lost=0)


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once(name, tally):
    one_input(bytes.fromhex(FOUND[name]))
    tally("random damage", tried=1, lost=0)


@pytest.mark.parametrize("layout", sorted(samples()))
def test_without_damage_every_sample_is_read(layout, tmp_path, tally):
    """Otherwise the target would test nothing."""
    assert check(layout, samples()[layout], tmp_path) or layout in NEEDS_OPTIONS
    tally("random damage", tried=1, lost=0)


NEEDS_OPTIONS = ("for-ai-molora", "meteora", "mola", "peft-router")
