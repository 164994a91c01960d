"""Ctrl-C, as a terminal sends it: no half files, exit code 130, and a word on how to go on."""

import os
import signal
import subprocess
import sys
import time

import numpy as np

import moe_lora_interop
from tests.adapters import make_adapter

RUN = "import sys; from moe_lora_interop.cli.main import main; sys.exit(main(sys.argv[1:]))"
SLOW = """
import sys, time
from moe_lora_interop.disk import atomic
sync = atomic._sync
def slow(path):
    print("writing", flush=True)
    time.sleep(0.02)
    sync(path)
atomic._sync = slow
"""


def start(*args, before=""):
    command = [sys.executable, "-c", before + RUN, *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_an_interrupted_conversion_is_whole_or_absent(tmp_path, tries, tally):
    adapter, lost = make_adapter(top_k=2), 0
    moe_lora_interop.write(adapter, tmp_path / "source")
    count = tries(4, 40)
    for attempt in range(count):
        target = tmp_path / str(attempt)
        with start("convert", tmp_path / "source", target, "--to", "native", before=SLOW) as process:
            assert process.stdout.readline() == "writing\n"
            time.sleep(0.12 * attempt / count)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, 130) and "Traceback" not in errors
        if process.returncode == 130:
            assert "interrupted: nothing is left half-written; the same command starts again" in errors
        left = sorted(p.name for p in target.rglob("*")) if target.exists() else []
        if left:
            found = moe_lora_interop.read(target)
            same = all(np.array_equal(found.tensors[slot], t) for slot, t in adapter.tensors.items())
            lost += not same or any(name.startswith(".") for name in left)
    tally("conversions interrupted by Ctrl-C", tried=count, lost=lost)
