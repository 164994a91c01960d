"""Where and with what a table was measured."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft", "numpy", "safetensors")


def describe() -> str:
    """One line: date, cores, processor, memory, versions. Linux only, as far as the processor is concerned."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    cores = len(os.sched_getaffinity(0))
    today = datetime.date.today().isoformat()
    return f"{today}: {cores} CPU cores ({model}), {memory:.0f} GiB. Python {platform.python_version()}, {versions}."
