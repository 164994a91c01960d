"""The benchmarks run, on tiny sizes; no time is judged. And the forms that they compare compute the same."""

import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, llama
from benchmarks.__main__ import CPU, QUICK, main


@pytest.mark.parametrize("name", QUICK)
def test_every_benchmark_gives_its_rows(name, tmp_path):
    main(["--quick", "--only", name, "--markdown", str(tmp_path / "table.md")])
    text = (tmp_path / "table.md").read_text()
    assert f"jax {jax.__version__}" in text
    head, _, *rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head] == ["goal", "measured", "spread", "met", "note"] and rows
    for goal, measured, _, met, note in rows:
        assert met == "-", "tiny sizes judge nothing"
        assert goal.strip() and (any(c.isdigit() for c in measured) or "not installed" in note), (goal, measured, note)


@pytest.mark.parametrize("name", ["model", "decode"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_given_model_is_measured_instead(name, tied, tmp_path, monkeypatch, capsys):
    llama.save(tmp_path / "given", quick=True, tie_word_embeddings=tied)
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "given"), "--quick"])
    runpy.run_path(str(Path(gpu.__file__).with_name(f"{name}.py")), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines and all("given, " in line and line.count("|") == 4 for line in lines)


def test_the_gpu_is_not_among_the_cpu_benchmarks():
    assert set(QUICK) - set(CPU) == {"gpu"}


def test_sparse_and_dense_delta_are_the_same_function():
    tokens, experts, rank, size_in, size_out = 13, 5, 3, 8, 6
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (tokens, size_in))
    a = jax.random.normal(keys[1], (experts, rank, size_in))
    b = jax.random.normal(keys[2], (experts, rank, size_out))
    scores = np.array(jax.random.uniform(keys[3], (tokens, experts), minval=0.1))
    scores[np.arange(tokens)[:, None], np.argsort(scores)[:, : experts - gpu.TOP_K]] = 0.0
    expected = sum(scores[:, e, None] * (np.asarray(x) @ np.asarray(a[e]).T @ np.asarray(b[e])) for e in range(experts))
    cotangent = jax.random.normal(keys[4], expected.shape)
    gradients = []
    for delta in (gpu.dense_delta, gpu.sparse_delta):
        y, pull = jax.vjp(delta, x, jnp.asarray(scores), a, b)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
        gradients.append(pull(cotangent))
    for k, (dense, sparse) in enumerate(zip(*gradients, strict=True)):
        used = scores > 0 if k == 1 else slice(None)  # the sparse form has no gradient for gates that are 0
        np.testing.assert_allclose(sparse[used], dense[used], rtol=1e-4, atol=1e-4)
