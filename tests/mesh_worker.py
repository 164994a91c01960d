"""A script, run by tests/test_mesh.py with 8 forced devices: `mesh_worker.py DIRECTORY MESH ...` prints JSON."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from mesh_base import adapted, write_base
from tiny_training import token_data

import moe_lora_jax as mlj
from moe_lora_jax.adapters.filters import PARTS
from moe_lora_jax.sharding import mesh_of, put_rows
from moe_lora_jax.train import Batch, make_train_step, merge_back, split_model
from moe_lora_jax.train.batches import collate

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 2, "data": 4},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
    "expert": {"expert": 4, "data": 2},
}
VARIANTS = {
    "": {},
    "scan": {"scan": True},
    "ffn": {"scope": "ffn", "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "model": {"scope": "model"},
}
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
FIELDS = {"router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001, "lora_dropout": 0.1}


def batch() -> Batch:
    rows, _ = collate(token_data(16).examples, 16, (24,), 0)
    return Batch(*(x.reshape(2, 8, -1) for x in rows))


def trained(base: Path, mesh: dict[str, int] | None, **fields) -> dict:
    """Ten steps: their losses, the trained adapter, what the layers then answer, and the program's collectives."""
    model = adapted(base, mesh, **FIELDS, **fields)
    optimizer = optax.sgd(0.5)
    model.train()
    graphdef, state, frozen = split_model(model, PARTS["all"], optimizer)
    step = make_train_step(graphdef, optimizer, model.moe_lora_config, state)
    rows = put_rows(batch(), mesh_of(model), axis=1)
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
        "parts": {path: leaf.size // leaf.addressable_shards[0].data.size for path, leaf in spread(model).items()},
    }


def spread(model: nnx.Module) -> dict[str, jax.Array]:
    """The variables of the model without its second layer."""
    flat = {".".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(nnx.state(model))}
    return {
        path: leaf for path, leaf in flat.items() if "layers.1" not in path and "rngs" not in path and leaf.size > 0
    }


def main(directory: Path, names: list[str]) -> None:
    """For every name, "MESH" or "MESH, VARIANT", also one device with that variant: "one, VARIANT"."""
    base, answer = write_base(directory / "base"), {}
    for name in names:
        mesh, _, variant = name.partition(", ")
        fields = VARIANTS[variant]
        one = f"one, {variant}"
        if one not in answer:
            answer[one] = trained(base, None, **fields)
        answer[name] = trained(base, MESHES[mesh], **fields)
    print(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
