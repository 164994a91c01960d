"""One conversion, check or description in a process of its own, which then says on stderr what it took.

python -m benchmarks.one_process convert SOURCE TARGET FROM TO
python -m benchmarks.one_process verify DIRECTORY
python -m benchmarks.one_process inspect DIRECTORY
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import moe_lora_interop
from moe_lora_interop.cli.main import main as cli
from moe_lora_interop.dialects.loramoe import LORAMOE
from moe_lora_interop.dialects.registry import register_dialect

PER_EXPERT = dataclasses.replace(LORAMOE, name="loramoe-safetensors", weights="adapter_model.safetensors")
"""LoRAMoE's tensors, one per expert, without its .bin file, which torch writes as a whole."""


def most_memory() -> float:
    """The largest resident set of this process so far, in MB of 10^6 bytes; Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def main(verb: str, *arguments: str) -> None:
    register_dialect(PER_EXPERT)
    before, start = most_memory(), time.perf_counter()
    if verb == "convert":
        source, target, layout, to = arguments
        moe_lora_interop.convert(source, target, layout=layout, to=to)
    else:
        cli([verb, *arguments])
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "imports_mb": before, "peak_mb": most_memory()}), file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
