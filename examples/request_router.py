"""One expert for a whole request: folders of ordinary LoRAs, and a router of your own that reads the request.

    python examples/request_router.py BASE LORA LORA ... --prompt "what is" --prompt "how do I"

The mixture routes by task, scope "model": row e of its table gives expert e alone, and the row after the last one is
the average of all. So a request's task id is its gate, and whoever calls the model decides it. Here the mean hidden
state of a first pass through the base decides, by the nearest of those of the prompts that the adapters are for.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import moe_lora_jax as mlj
from moe_lora_interop import Adapter
from moe_lora_interop.export.combining import combine
from moe_lora_jax.train import load_tokenizer

NEVER = -1e9  # exp(NEVER) is 0


def by_request(directories: list[str]) -> Adapter:
    """A mixture of these adapters in which a request's task id is its expert; the last id is their average."""
    combined = combine(directories)
    experts = combined.config.num_experts
    table = np.concatenate([np.where(np.eye(experts), 0, NEVER), np.zeros((1, experts))]).astype(np.float32)
    config = dataclasses.replace(
        combined.config, scope="model", router_input="task", router_depth=0, num_tasks=experts + 1
    )
    tensors = {slot: tensor for slot, tensor in combined.tensors.items() if slot[1] != "router"}
    return Adapter(config, {**tensors, ("", "task_embedding"): table}, base_tensors=combined.base_tensors)


def request_vectors(model: mlj.CausalLM, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean over each request's tokens of the base's last hidden state: [request, hidden]."""
    hidden, _ = model.model(ids, mask != 0, None, None)  # the decoder by itself: without gates, without the adapter
    return jnp.sum(hidden * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)


def nearest(vectors: jax.Array, centres: jax.Array) -> jax.Array:
    """The task id of each request: the expert whose centre [expert, hidden] is nearest."""
    return jnp.argmin(jnp.linalg.norm(vectors[:, None] - centres, axis=-1), axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--prompt", action="append", required=True, help="what an adapter is for, in order")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.base)
    model = mlj.load_base_model(args.base)
    mlj.load_adapter(model, by_request(args.adapters))

    def vectors(text: str) -> jax.Array:
        ids = jnp.asarray([tokenizer(text)["input_ids"]])
        return request_vectors(model, ids, jnp.ones_like(ids))

    centres = jnp.concatenate([vectors(prompt) for prompt in args.prompt])
    for line in iter(lambda: input("request: "), ""):
        task_ids = nearest(vectors(line), centres)
        ids = jnp.asarray([tokenizer(line)["input_ids"]])
        tokens = mlj.generate(model, ids, max_new_tokens=16, task_ids=task_ids)
        print(f"{args.adapters[int(task_ids[0])]}: {tokenizer.decode(np.asarray(tokens)[0])}")


if __name__ == "__main__":
    main()
