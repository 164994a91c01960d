"""For every test: programs are compiled cheaply, and torch uses one thread, because the workers share the cores."""

import jax
import pytest

FULLY_OPTIMISED = ("test_parity", "test_peers", "test_models", "test_layers")  # numbers as users get them

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
