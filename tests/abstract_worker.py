"""A script, run by tests/test_abstract.py with 8 forced devices: `abstract_worker.py BASE` prints what differs."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import moe_lora_jax as mlj
from moe_lora_jax.adapters.filters import PARTS
from moe_lora_jax.sharding import row_sharding
from moe_lora_jax.train import Batch, adamw, make_train_step, split_model, warmup_cosine

ALL = {"r": 2, "num_experts": 4, "top_k": 2, "target_modules": "all-linear"}
NOISY = {"lora_dropout": 0.1, "router_jitter_noise": 0.1, "expert_dropout": 0.1}
FFN = {**ALL, "scope": "ffn", "target_modules": ["gate_proj", "up_proj", "down_proj"]}
CASES = {
    "no mesh": ({}, {**ALL, **NOISY}, {}, "all"),
    "fsdp": ({"fsdp": 8}, ALL, {"scan_layers": True}, "all"),
    "mixed, ffn": ({"data": 2, "fsdp": 2, "tensor": 2}, FFN, {"scan_layers": True}, "all"),
    "expert, routers only": ({"expert": 4, "data": 2}, {**ALL, **NOISY}, {"dtype": "bfloat16"}, "router"),
    "model": ({"tensor": 2, "data": 4}, {**ALL, "scope": "model"}, {"scan_layers": True}, "experts"),
}


def described(tree) -> dict[str, str]:
    """{path: shape, dtype and place} of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.shape} {leaf.dtype} {place(leaf)}" for path, leaf in leaves}


def place(leaf) -> str:
    where = leaf.sharding
    if where is None or not hasattr(where, "spec"):
        return "anywhere"
    return str(where.shard_shape(leaf.shape))


def differences(base: Path, name: str) -> list[str]:
    """Leaves of the states, and whether the lowered steps are one text."""
    axes, fields, options, part = CASES[name]
    mesh = mlj.make_mesh(axes) if axes else None
    texts, states = [], []
    for load in (mlj.load_base_model, mlj.abstract_base_model):
        model = load(base, mesh=mesh, **options)
        assert mlj.apply_moe_lora(model, mlj.MoeLoraConfig(**fields), rngs=nnx.Rngs(0)) is model
        model.train()
        optimizer = adamw(warmup_cosine(1e-3, 2, 10), weight_decay=0.0, max_grad_norm=1.0)
        graphdef, state, frozen = split_model(model, PARTS[part], optimizer)
        step = make_train_step(graphdef, optimizer, model.moe_lora_config, state)
        where = None if mesh is None else row_sharding(mesh, 1)
        kinds = (jnp.int32, jnp.int32, bool)
        batch = Batch(*(jax.ShapeDtypeStruct((1, 8, 16), kind, sharding=where) for kind in kinds))
        texts.append(step.lower(state, frozen, batch).as_text())
        states.append({**described(state), **described(frozen)})
    real, abstract = states
    paths = [path for path in {**real, **abstract} if real.get(path) != abstract.get(path)]
    found = [f"{path}: {real.get(path)} != {abstract.get(path)}" for path in paths]
    return found + ([] if texts[0] == texts[1] else ["the lowered steps differ"])


if __name__ == "__main__":
    print(json.dumps({name: differences(Path(sys.argv[1]), name) for name in CASES}))
