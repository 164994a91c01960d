"""For every test: programs are compiled cheaply, torch uses one thread because the workers share the cores; and counts.

Tests of robustness take a number of tries from `tries(short, full)`, and report to `tally`; `--full` is what
`make trust` passes, and the summary has one line per point.
"""

import os
from collections import defaultdict
from pathlib import Path

import jax
import pytest

FULLY_OPTIMISED = (
    "test_parity",
    "test_peers",
    "test_models",
    "test_layers",
    "test_golden",
)  # numbers as users get them

try:
    import torch
except ModuleNotFoundError:
    pass
else:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def cheap_compilation(request):
    """XLA's optimisations cost most of the time of tests that run each program once."""
    before = jax.config.read("jax_disable_most_optimizations")
    cheap = request.module.__name__.rpartition(".")[2] not in FULLY_OPTIMISED
    jax.config.update("jax_disable_most_optimizations", cheap)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    if resident_bytes() > 3 * 2**30:  # compiled programs, which later modules have no use for; two workers share 24 GB
        jax.clear_caches()


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the long form of the robustness tests (make trust)")


@pytest.fixture
def tries(request):
    """tries(short, full): how often to try."""
    return lambda short, full: full if request.config.getoption("--full") else short


@pytest.fixture
def tally(record_property):
    """tally("saves killed", tried=200, lost=0): counts for the summary; fails if anything was lost."""

    def count(point: str, *, tried: int, lost: int) -> None:
        record_property("tally", (point, tried, lost))
        assert tried > 0 and lost == 0, f"{point}: {lost} lost of {tried}"

    return count


@pytest.fixture
def measured(record_property):
    """measured("losses on meshes", 1e-6): the summary has the largest value under each name."""
    return lambda name, value: record_property("measured", (name, float(value)))


def pytest_terminal_summary(terminalreporter):
    points, largest = defaultdict(lambda: [0, 0]), defaultdict(float)
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        for name, value in report.user_properties if getattr(report, "when", "") == "call" else ():
            if name == "tally":
                point, tried, lost = value
                points[point][0] += tried
                points[point][1] += lost
            elif name == "measured":
                largest[value[0]] = max(largest[value[0]], value[1])
    if points:
        terminalreporter.section("tried, survived, lost")
        for point, (tried, lost) in sorted(points.items()):
            terminalreporter.write_line(f"{point}: {tried} tried, {tried - lost} survived, {lost} lost")
    if largest:
        terminalreporter.section("largest measured")
        for name, value in sorted(largest.items()):
            terminalreporter.write_line(f"{name}: {value:.3g}")
