"""Many processes on one adapter, and many loads in one process."""

import multiprocessing
import time

import pytest

import moe_lora_interop
from tests.trust_workers import (
    load_and_remove_in_jax,
    load_switch_and_delete_in_peft,
    read_for_a_while,
    save_for_ever,
)
from tools.samples import sample

MARGIN = 1.05  # of the memory after warming up


@pytest.fixture(scope="module")
def processes():
    """Children fork from a process without jax and torch, which is ready."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trust_workers"])
    return context


@pytest.mark.parametrize(("layout", "pause"), [("native", 0), ("xlora", 0), ("loramoe", 0.5)])
def test_readers_during_saves_see_the_old_or_the_new_or_are_told(tmp_path, tries, tally, processes, layout, pause):
    """Two adapters of the same shapes, saved in turn with `pause` seconds between, and three readers.

    Detection opens a .bin file for every layout, which takes longer than a save: without a pause every read is refused.
    """
    adapters, directory = {}, tmp_path / "out"
    for seed in range(2):
        moe_lora_interop.write(sample(layout, seed=seed), tmp_path / str(seed), layout)
        adapters[str(seed)] = moe_lora_interop.read(tmp_path / str(seed))
    moe_lora_interop.write(adapters["0"], directory, layout)
    writer = processes.Process(target=save_for_ever, args=(adapters, directory, layout, None, pause))
    writer.start()
    while not (directory / "saves_go_on").exists():
        assert writer.is_alive()
        time.sleep(0.01)
    with processes.Pool(3) as pool:
        reads = tries(15, 400)
        results = pool.starmap(read_for_a_while, [(adapters, directory, reads)] * 3)
    assert writer.is_alive()
    writer.kill()
    writer.join()
    seen = {kind: sum(r.get(kind, 0) for r in results) for kind in sorted({k for r in results for k in r})}
    tried, lost = sum(seen.values()), sum(n for kind, n in seen.items() if kind not in ("0", "1", "refused"))
    assert lost == 0, seen
    assert seen.get("0") and seen.get("1"), seen
    tally(f"reads during saves ({layout})", tried=tried, lost=lost)


def test_eight_processes_read_one_adapter(tmp_path, tries, tally, processes):
    moe_lora_interop.write(sample("native"), tmp_path)
    adapters, reads = {"it": moe_lora_interop.read(tmp_path)}, tries(10, 100)
    with processes.Pool(8) as pool:
        results = pool.starmap(read_for_a_while, [(adapters, tmp_path, reads)] * 8)
    lost = sum(result != {"it": reads} for result in results)
    tally("processes that read one adapter together", tried=len(results), lost=lost)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_loading_and_removing_in_jax_leaks_no_memory(tmp_path, tries, tally, processes):
    from moe_lora_jax import save_pretrained
    from tests.test_checkpoint import adapted

    for n, fields in enumerate((dict(r=4), dict(r=4, num_experts=5))):
        save_pretrained(adapted(**fields), tmp_path / str(n))
    cycles = tries(40, 300)
    with processes.Pool(1) as pool:
        growth = pool.apply(load_and_remove_in_jax, (tmp_path, cycles))
    assert growth < MARGIN
    tally("load and remove in JAX", tried=cycles, lost=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_loading_switching_and_deleting_in_peft_leaks_no_memory(tmp_path, tries, tally, processes):
    import peft
    from test_peft_support import config, tiny_llama

    for n, fields in enumerate((dict(r=4), dict(r=8, num_experts=5))):
        peft.get_peft_model(tiny_llama(), config(**fields)).save_pretrained(tmp_path / str(n))
    cycles = tries(40, 300)
    with processes.Pool(1) as pool:
        growth = pool.apply(load_switch_and_delete_in_peft, (tmp_path, cycles))
    assert growth < MARGIN
    tally("load, switch and delete in PEFT", tried=cycles, lost=0)
