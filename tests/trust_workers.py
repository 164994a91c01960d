"""What the robustness tests run in processes of their own, which import neither jax nor torch. No test of its own."""

import gc
import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

import moe_lora_interop
from moe_lora_interop import Adapter, CheckpointError


def save_for_ever(
    adapters: Mapping[str, Adapter], directory: Path, layout: str, saves: int | None = None, pause: float = 0
) -> None:
    """Saves one adapter after the other (for ever if `saves` is None); the file saves_go_on says that it has begun."""
    turn = itertools.cycle(adapters.values())
    for n in itertools.count() if saves is None else range(saves):
        moe_lora_interop.write(next(turn), directory, layout)
        if n == 1:
            (directory / "saves_go_on").touch()
        time.sleep(pause)


def save_as_another_user(adapter: Adapter, directory: Path) -> str:
    """What a user without rights on the directory is told."""
    with tempfile.TemporaryDirectory() as folder:  # imports all that it needs, from where this user may not read
        moe_lora_interop.write(adapter, Path(folder, "out"))
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        moe_lora_interop.write(adapter, directory)
    except CheckpointError as error:
        return str(error)
    return "saved"


def read_for_a_while(adapters: Mapping[str, Adapter], directory: Path, reads: int) -> dict[str, int]:
    """How often each adapter was read, "refused", or another thing.

    Reads at least `reads` times, and then until each adapter was seen (at most a minute): a reader that keeps time with
    the writer may meet the same one again and again.
    """
    known = {_bits(adapter): name for name, adapter in adapters.items()}
    seen: Counter[str] = Counter()
    end = time.monotonic() + 60
    while seen.total() < reads or (not seen.keys() >= set(known.values()) and time.monotonic() < end):
        try:
            seen[known.get(_bits(moe_lora_interop.read(directory)), "a mixture")] += 1
        except CheckpointError as error:
            seen["refused" if "going on" in str(error) else f"refused as {error}"] += 1
        except Exception as error:
            seen[f"{type(error).__name__}: {error}"] += 1
    return dict(seen)


def _bits(adapter: Adapter) -> tuple[str, ...]:
    return (repr(adapter.config), *(f"{slot}{t.tobytes()!r}" for slot, t in sorted(adapter.tensors.items())))


def load_and_remove_in_jax(folder: Path, cycles: int) -> float:
    """Loads folder/0 and folder/1 in turn; memory at the end relative to that after a third of the cycles."""
    import jax

    from moe_lora_jax import load_adapter, remove_moe_lora
    from tests.toy import Toy, run

    model, kept = Toy(), {}

    def cycle(n: int) -> None:
        load_adapter(model, folder / str(n % 2))
        found = np.array(run(model))  # a copy: the view that `run` returns keeps the array of jax alive
        assert np.array_equal(found, kept.setdefault(n % 2, found))
        remove_moe_lora(model)
        if n % 10 == 9:
            gc.collect()
            assert len(jax.live_arrays()) == kept.setdefault("arrays", len(jax.live_arrays()))

    return _growth(cycle, cycles)


def load_switch_and_delete_in_peft(folder: Path, cycles: int) -> float:
    """Likewise, beside an adapter that stays."""
    import peft
    import torch

    from tests.test_peft_support import logits, tiny_llama

    model, kept = peft.PeftModel.from_pretrained(tiny_llama(), folder / "0"), {}

    def cycle(n: int) -> None:
        model.load_adapter(folder / str(n % 2), f"adapter_{n}")
        model.set_adapter(f"adapter_{n}")
        found = logits(model)
        assert torch.equal(found, kept.setdefault(n % 2, found))
        model.set_adapter("default")
        model.delete_adapter(f"adapter_{n}")
        assert len(list(model.parameters())) == kept.setdefault("parameters", len(list(model.parameters())))

    return _growth(cycle, cycles)


def _growth(cycle: Callable[[int], None], cycles: int) -> float:
    for n in range(cycles):
        cycle(n)
        if n == cycles // 3:
            gc.collect()
            before = rss()
    gc.collect()
    return rss() / before


def rss() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
