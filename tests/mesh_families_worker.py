"""A script, run by tests/test_models_families.py with 8 forced devices: joined projections, and norms over all heads.

Prints, for each base, how far logits and the adapter's gradient on a mesh are from those of one device, and into how
many parts the mesh cuts weights.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from mesh_base import adapted, write_base

import moe_lora_jax as mlj

BASES = {
    "phi3": {"architectures": ["Phi3ForCausalLM"], "rope_scaling": None},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
}
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def computed(model) -> list[np.ndarray]:
    ids = np.random.default_rng(0).integers(1, 72, (4, 16))
    graph, adapter, rest = nnx.split(model, mlj.MoeLoraParam, ...)

    def loss(adapter, rest):
        logits = nnx.merge(graph, adapter, rest, copy=True)(ids)
        return jnp.sum(jnp.sin(logits)), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(adapter, rest)
    return [np.asarray(a) for a in (logits, *jax.tree.leaves(gradient))]


def main(directory: Path) -> None:
    answer = {}
    for name, fields in BASES.items():
        base = write_base(directory / name, num_hidden_layers=1, **fields)
        alone, spread = (adapted(base, mesh, init_lora_weights=False, top_k=None) for mesh in (None, MESH))
        pairs = list(zip(computed(spread), computed(alone), strict=True))
        parts = {
            ".".join(map(str, path)): v.size // v.get_value().addressable_shards[0].data.size
            for path, v in nnx.to_flat_state(nnx.state(spread))
            if "kernel" in path and "router" not in path
        }
        off = max(float(np.abs(found - wanted).max() / np.abs(wanted).max()) for found, wanted in pairs)
        answer[name] = {"off": off, "compared": len(pairs), "parts": parts}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
