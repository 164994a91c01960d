"""Goal 6: a file of 1 GB from the native layout to one tensor per expert and back, against `cp` and fsync.

Memory is the largest resident set of a process of its own. Cold: the source's pages are dropped from the cache first.
The files are where `tempfile` puts them (TMPDIR), which should be on a disk.
"""

import filecmp
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

import moe_lora_interop
from benchmarks.measure import Ratio, Row
from benchmarks.one_process import PER_EXPERT
from benchmarks.startup import start_row
from benchmarks.table import alone, ratio_row
from moe_lora_interop.disk.files import WEIGHTS_NAME, read_header

EXPERTS = 8
LAYOUTS = {"native": "native", "per expert": PER_EXPERT.name}


def write_adapter(directory: Path, dtype: str, *, quick: bool) -> float:
    """A mixture on every linear layer of a Llama of 7B parameters, of random bits. Largest stacked tensor, in MB."""
    hidden, inner, layers, rank = (8, 12, 2, 2) if quick else (4096, 11008, 32, {"bf16": 24, "fp32": 12}[dtype])
    kinds = dict.fromkeys((f"self_attn.{n}_proj" for n in "qkvo"), (hidden, hidden))
    kinds |= {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
    rng = np.random.default_rng(0)
    bits = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp32": np.dtype(np.float32)}[dtype]

    def random(*shape: int, dtype: np.dtype = bits) -> np.ndarray:
        return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)

    tensors = {}
    for layer, (kind, (n_in, n_out)) in itertools.product(range(layers), kinds.items()):
        module = f"model.layers.{layer}.{kind}"
        tensors[module, "lora_A"] = random(EXPERTS, rank, n_in)
        tensors[module, "lora_B"] = random(EXPERTS, n_out, rank)
        tensors[module, "router"] = random(EXPERTS, n_in, dtype=np.dtype(np.float32))
    targets = [kind.split(".")[1] for kind in kinds]
    config = moe_lora_interop.MoeLoraConfig(
        r=rank, num_experts=EXPERTS, target_modules=targets, router_aux_loss="localized"
    )
    moe_lora_interop.write(moe_lora_interop.Adapter(config, tensors), directory)
    return max(t.nbytes for t in tensors.values()) / 1e6


def in_process(*arguments: object) -> dict[str, float]:
    """What `benchmarks.one_process` says."""
    command = [sys.executable, "-m", "benchmarks.one_process", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stderr.splitlines()[-1])


def copy(source: Path, target: Path) -> float:
    """Seconds of `cp` and fsync."""
    target.unlink(missing_ok=True)
    start = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


def set_cache(path: Path, *, warm: bool) -> None:
    """Everything written so far to disk, then `path` into the page cache or out of it."""
    os.sync()
    with path.open("rb") as file:
        if not warm:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while warm and file.read(2**24):
            pass


def rows(quick: bool) -> Iterator[Row]:
    for dtype in ("bf16", "fp32"):
        with tempfile.TemporaryDirectory() as scratch:
            yield from _rows(Path(scratch), dtype, quick=quick)


def _rows(scratch: Path, dtype: str, *, quick: bool) -> Iterator[Row]:
    where = {name: scratch / name for name in LAYOUTS}
    largest = write_adapter(where["native"], dtype, quick=quick)
    in_process("convert", where["native"], where["per expert"], "native", PER_EXPERT.name)
    for source, target in (("native", "per expert"), ("per expert", "native")):
        original = where[source] / WEIGHTS_NAME
        size, count = original.stat().st_size / 1e6, len(read_header(original)[0])
        for cache in ("warm", "cold"):
            rounds, took = [], {}
            for number in range(2 if quick else 5):
                copied = math.nan
                for turn in ("copy", "convert") if number % 2 else ("convert", "copy"):
                    set_cache(original, warm=cache == "warm")
                    if turn == "copy":
                        copied = copy(original, scratch / "copy")
                        continue
                    shutil.rmtree(scratch / "out", ignore_errors=True)
                    took = in_process("convert", where[source], scratch / "out", LAYOUTS[source], LAYOUTS[target])
                rounds.append((copied / took["seconds"], took["seconds"]))
            low, median, high = statistics.quantiles([ratio for ratio, _ in rounds], n=4)
            ratio = Ratio(median, low, high, statistics.median(seconds for _, seconds in rounds))
            goal = f"6. {source} -> {target}, {dtype}, {cache}: >= 0.65x the throughput of cp and fsync"
            note = f"{size:.0f} MB, {count} tensors, {ratio.seconds:.2f} s; without the start of Python"
            yield ratio_row(goal, ratio, median >= 0.65, note)
        same = filecmp.cmp(scratch / "out" / WEIGHTS_NAME, where[target] / WEIGHTS_NAME, shallow=False)
        assert same, f"{source} -> {target} gives other bytes than were there"
        goal = f"6. {source} -> {target}, {dtype}: memory beyond the imports <= 40 MB + the largest tensor"
        yield memory_row(goal, took, beyond_imports=40 + largest, note=f"largest stacked tensor {largest:.1f} MB")
    took = in_process("verify", where["native"])
    yield memory_row(f"6. verify, {dtype}: memory <= the file", took, whole=size, note=f"{took['seconds']:.2f} s")
    took = in_process("inspect", where["native"])
    yield memory_row(f"6. inspect, {dtype}: memory <= 60 MB", took, whole=60, note="")
    command = [sys.executable, "-m", "moe_lora_interop.cli.main", "inspect", where["native"]]
    goal = f"6. inspect, {dtype}: <= 0.4 s, with the start of Python"
    yield start_row(goal, command, limit=0.4, runs=2 if quick else 10)


def memory_row(goal: str, took: Mapping[str, float], *, note: str, beyond_imports: float = 0, whole: float = 0) -> Row:
    """Judges the peak beyond what was there after the imports, or the process's whole peak; says both."""
    peak, imports = took["peak_mb"], took["imports_mb"]
    met = peak - imports <= beyond_imports if beyond_imports else peak <= whole
    measured = f"{peak - imports:.1f} MB beyond {imports:.1f}" if beyond_imports else f"{peak:.1f} MB"
    return Row(goal, measured, "", met, "; ".join(filter(None, [f"peak of the whole process {peak:.1f} MB", note])))


if __name__ == "__main__":
    alone(rows)
