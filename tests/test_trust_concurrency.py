"""Many processes on one adapter, and many loads in one process."""

import gc
import multiprocessing

import numpy as np
import pytest

import interop
from interop.samples import sample
from tests.trust_workers import read_for_a_while, rss, save_for_ever

MARGIN = 1.05  # of the memory after warming up


@pytest.fixture(scope="module")
def processes():
    """Children fork from a process without jax and torch, which is ready."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trust_workers"])
    return context


@pytest.mark.parametrize("layout", ["native", "xlora", "loramoe"])
def test_readers_during_saves_see_the_old_or_the_new_or_are_told(tmp_path, tries, tally, processes, layout):
    """Two adapters of the same shapes, saved in turn as fast as it goes, and three readers."""
    adapters, directory = {}, tmp_path / "out"
    for seed in range(2):
        interop.write(sample(layout, seed=seed), tmp_path / str(seed), layout)
        adapters[str(seed)] = interop.read(tmp_path / str(seed))
    interop.write(adapters["0"], directory, layout)
    writer = processes.Process(target=save_for_ever, args=(adapters, directory, layout))
    writer.start()
    with processes.Pool(3) as pool:
        reads = tries(15, 400)
        results = pool.starmap(read_for_a_while, [(adapters, directory, reads)] * 3)
    assert writer.is_alive()
    writer.kill()
    writer.join()
    seen = {kind: sum(r.get(kind, 0) for r in results) for kind in sorted({k for r in results for k in r})}
    tried, lost = sum(seen.values()), sum(n for kind, n in seen.items() if kind not in ("0", "1", "refused"))
    assert lost == 0, seen
    assert seen["0"] and seen["1"], seen
    tally(f"reads during saves ({layout})", tried=tried, lost=lost)


def test_eight_processes_read_one_adapter(tmp_path, tries, tally, processes):
    interop.write(sample("native"), tmp_path)
    adapters, reads = {"it": interop.read(tmp_path)}, tries(10, 100)
    with processes.Pool(8) as pool:
        results = pool.starmap(read_for_a_while, [(adapters, tmp_path, reads)] * 8)
    lost = sum(result != {"it": reads} for result in results)
    tally("processes that read one adapter together", tried=len(results), lost=lost)


# --- memory -----------------------------------------------------------------------------------------------------------


def grown(cycle, cycles: int) -> tuple[float, int]:
    """Memory after `cycles` relative to that after a third of them, and the cycles in which it was measured."""
    warm = cycles // 3
    for n in range(cycles):
        cycle(n)
        if n == warm:
            gc.collect()
            before = rss()
    gc.collect()
    return rss() / before, cycles - warm


def test_loading_and_removing_in_jax_leaks_no_memory(tmp_path, tries, tally):
    import jax

    from moe_lora_jax import load_adapter, remove_moe_lora
    from tests.test_checkpoint import adapted
    from tests.toy import Toy, run

    for n, fields in enumerate((dict(r=4), dict(r=4, num_experts=5))):
        interop.write(interop.read(saved(adapted(**fields), tmp_path / f"made{n}")), tmp_path / str(n))
    model, kept = Toy(), {}

    def cycle(n):
        load_adapter(model, tmp_path / str(n % 2))
        found = np.array(run(model))  # a copy: the view that `run` returns keeps the array of jax alive
        assert np.array_equal(found, kept.setdefault(n % 2, found))
        remove_moe_lora(model)
        if n % 10 == 9:
            gc.collect()
            assert len(jax.live_arrays()) == kept.setdefault("arrays", len(jax.live_arrays()))

    growth, cycles = grown(cycle, tries(40, 300))
    assert growth < MARGIN
    tally("load and remove in JAX", tried=cycles, lost=0)


def saved(model, directory):
    from moe_lora_jax import save_pretrained

    save_pretrained(model, directory)
    return directory


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_loading_switching_and_deleting_in_peft_leaks_no_memory(tmp_path, tries, tally):
    import peft
    import torch

    from tests.test_peft_support import config, logits, tiny_llama

    for n, fields in enumerate((dict(r=4), dict(r=8, num_experts=5))):
        peft.get_peft_model(tiny_llama(), config(**fields)).save_pretrained(tmp_path / str(n))
    model, kept = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "0"), {}

    def cycle(n):
        name = f"adapter_{n}"
        model.load_adapter(tmp_path / str(n % 2), name)
        model.set_adapter(name)
        found = logits(model)
        assert torch.equal(found, kept.setdefault(n % 2, found))
        model.set_adapter("default")
        model.delete_adapter(name)
        del found
        kept.setdefault("parameters", sum(1 for _ in model.parameters()))
        assert sum(1 for _ in model.parameters()) == kept["parameters"]

    growth, cycles = grown(cycle, tries(40, 300))
    assert growth < MARGIN
    tally("load, switch and delete in PEFT", tried=cycles, lost=0)
