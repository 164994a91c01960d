"""A script, run by tests/test_processes.py as one of several processes: `process_worker.py MODE PORT N ID DIRECTORY`.

train    a long run into DIRECTORY/killed; a process that dies is noticed after 10 seconds instead of JAX's 100
adapter  saves, loads and generates with an adapter that no process has whole
refused  trains into a directory that cannot be written and into one that holds a run; saves where a file is
memory   loads a larger base model
"""

import json
import sys
import threading
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from mesh_base import adapted
from tiny_training import token_data

import moe_lora_interop
import moe_lora_jax as mlj
from moe_lora_interop.errors import CheckpointError
from moe_lora_jax.train import TrainSettings, train

PROMPTS = np.arange(12).reshape(4, 3)
RUN = {"batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 2, "log_every": 1}


def adapter(directory: Path) -> dict:
    model = adapted(directory / "base", {"fsdp": 2, "tensor": 2}, init_lora_weights=False)
    addressable = [leaf.is_fully_addressable for leaf in jax.tree.leaves(nnx.state(model, mlj.MoeLoraParam))]
    before = np.asarray(mlj.generate(model, PROMPTS, max_new_tokens=6))
    mlj.save_pretrained(model, directory / "adapter")
    again = mlj.load_base_model(directory / "base", mesh=mlj.make_mesh({"data": 2, "expert": 2}))
    mlj.load_adapter(again, directory / "adapter")
    after = np.asarray(mlj.generate(again, PROMPTS, max_new_tokens=6))
    had, stored = mlj.to_adapter(model), moe_lora_interop.read(directory / "adapter")
    return {
        "no process has whole": addressable.count(False),
        "before": before.tolist(),
        "after": after.tolist(),
        "exact": {str(slot): bool(np.array_equal(stored.tensors[slot], array)) for slot, array in had.tensors.items()},
    }


def refused(directory: Path) -> list[str]:
    messages = []
    for out in ("file", "held"):
        model = adapted(directory / "base", {"data": 4})
        try:
            train(model, token_data(8), directory / out, TrainSettings(steps=1, **RUN))
        except CheckpointError as error:
            messages.append(str(error))
    model = adapted(directory / "base", {"data": 4})
    try:
        mlj.save_pretrained(model, directory / "file")
    except CheckpointError as error:
        messages.append(str(error))
    return messages


def memory(directory: Path) -> dict:
    """What loading adds, at its peak, to the memory that is this process's own (without the mapped file), in bytes."""

    def anonymous() -> int:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["RssAnon"].split()[0]) * 1024

    def watch() -> None:
        while not loaded.wait(0.001):
            seen.append(anonymous())

    model = mlj.load_base_model(directory / "base", mesh=mlj.make_mesh({"data": jax.device_count()}))  # warms up
    del model
    start, seen, loaded = anonymous(), [0], threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = mlj.load_base_model(directory / "large", mesh=mlj.make_mesh({"fsdp": jax.device_count()}))
    jax.block_until_ready(nnx.state(model))
    loaded.set()
    watcher.join()
    leaves = jax.tree.leaves(nnx.state(model))
    return {
        "grown": max(seen) - start,
        "model": sum(leaf.nbytes for leaf in leaves),
        "here": sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
    }


def endless(directory: Path) -> None:
    model = adapted(directory / "base", {"data": 2, "fsdp": 2})
    train(model, token_data(64), directory / "killed", TrainSettings(steps=5000, **RUN), eval_data=token_data(4))


MODES = {"train": endless, "adapter": adapter, "refused": refused, "memory": memory}

if __name__ == "__main__":
    mode, port, number, own = sys.argv[1], *map(int, sys.argv[2:5])
    jax.distributed.initialize(f"localhost:{port}", number, own, heartbeat_timeout_seconds=10)
    answer = MODES[mode](Path(sys.argv[5]))
    Path(sys.argv[5], f"{mode}-{own}.json").write_text(json.dumps(answer))
