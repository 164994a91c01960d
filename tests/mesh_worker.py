"""A script, run by tests/test_mesh.py with 8 forced devices: `mesh_worker.py DIRECTORY MESH ...` prints JSON."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from mesh_base import GEMMA, adapted, write_base
from tiny_training import token_data

import moe_lora_jax as mlj
from moe_lora_jax.adapters.filters import PARTS
from moe_lora_jax.sharding import mesh_of, put_rows
from moe_lora_jax.train import Batch, make_train_step, merge_back, split_model
from moe_lora_jax.train.batches import collate, collate_packed
from moe_lora_jax.train.packing import PackedRows

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 2, "data": 4},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
    "expert": {"expert": 4, "data": 2},
    "data fsdp": {"data": 2, "fsdp": 4},
    "fsdp tensor": {"fsdp": 4, "tensor": 2},
    "fsdp expert": {"fsdp": 2, "expert": 4},
}
VARIANTS = {
    "": {},
    "scan, packed": {"scan": True, "packed": True, "loss_chunk": 7},  # which does not divide 24
    "ffn": {"scope": "ffn", "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "model": {"scope": "model"},
    "gemma": {},
    "one expert": {"num_experts": 1, "top_k": None, "r": 8},
}
BASES = {"gemma": GEMMA}
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
FIELDS = {"router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001, "lora_dropout": 0.1}


def batch(*, packed: bool) -> Batch:
    if packed:
        rows, _ = collate_packed(PackedRows(token_data(40).examples, 24, seed=0)[:16], 16, (24,), 0)
        assert rows.segment_ids is not None and rows.segment_ids.max() > 1
    else:
        rows, _ = collate(token_data(16).examples, 16, (24,), 0)
    return jax.tree.map(lambda x: x.reshape(2, 8, -1), rows)


def trained(
    base: Path, mesh: dict[str, int] | None, *, packed: bool = False, loss_chunk: int | None = None, **fields
) -> dict:
    """Ten steps: their losses, the trained adapter, what the layers then answer, and the program's collectives."""
    model = adapted(base, mesh, **FIELDS, **fields)
    optimizer = optax.sgd(0.5)
    model.train()
    graphdef, state, frozen = split_model(model, PARTS["all"], optimizer)
    step = make_train_step(graphdef, optimizer, model.moe_lora_config, state, loss_chunk=loss_chunk)
    rows = put_rows(batch(packed=packed), mesh_of(model), axis=1)
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    program = step.lower(state, frozen, rows).compile().as_text()
    losses = []
    for _ in range(10):
        state, metrics = step(state, frozen, rows)
        losses.append(float(metrics.loss))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == before
    merge_back(model, state, frozen)
    model.eval()
    tensors = {f"{m}.{kind}": array.tolist() for (m, kind), array in mlj.to_adapter(model).tensors.items()}
    prompts = np.arange(12).reshape(2, 6) % 60
    return {
        "losses": losses,
        "adapter": tensors,
        "generated": np.asarray(mlj.generate(model, prompts, max_new_tokens=5)).tolist(),
        "loss after": mlj.train.evaluate(model, token_data(8), batch_size=8),
        "collectives": Counter(" ".join(found[::-1]) for found in COLLECTIVE.findall(program)),
        "parts": parts(nnx.state(model)),
        "AdamW's parts": parts(split_model(model, PARTS["all"], optax.adamw(1.0))[1].opt_state),
    }


def parts(tree: Any) -> dict[str, int]:
    """{dotted path: into how many parts an array is cut}, without counters, RNG streams and the second layer."""
    found = {".".join(map(part, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return {
        path: leaf.size // leaf.addressable_shards[0].data.size
        for path, leaf in found.items()
        if "layers.1" not in path and "rngs" not in path and leaf.size > 1
    }


def part(key: Any) -> str:
    return str(next(getattr(key, field) for field in ("key", "idx", "name") if hasattr(key, field)))


def main(directory: Path, names: list[str]) -> None:
    """For every name, "MESH" or "MESH, VARIANT", also one device with that variant: "one, VARIANT"."""
    answer = {}
    for name in names:
        mesh, _, variant = name.partition(", ")
        fields, base = VARIANTS[variant], directory / f"base {variant}"
        if not base.exists():
            write_base(base, **BASES.get(variant, {}))
        one = f"one, {variant}"
        if one not in answer:
            answer[one] = trained(base, None, **fields)
        answer[name] = trained(base, MESHES[mesh], **fields)
    print(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
