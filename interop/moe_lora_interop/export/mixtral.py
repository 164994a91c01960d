"""A mixture of feed-forward blocks on a Llama or Mistral computes what a Mixtral computes: written as one."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.config.modules import block_of
from moe_lora_interop.disk.atomic import replace_files, require_empty
from moe_lora_interop.disk.dtypes import NUMPY, STORED
from moe_lora_interop.disk.files import TensorInfo, write_in_order
from moe_lora_interop.disk.lazy import Lazy
from moe_lora_interop.disk.model_directory import BaseModel
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.export.mixtral_checks import INERT, PROJECTIONS, adapter_problems, base_problems, fit_problems
from moe_lora_interop.export.readme import readme
from moe_lora_interop.progress import OnProgress, no_progress

Plan = dict[str, Lazy]
"""{name: tensor to be written}: its dtype and shape are known now, its values are made when it is its turn."""

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# The base's config fields that Mixtral has too, with what Llama and Mistral take where the file does not say.
_SHARED: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}


def export_mixtral(
    adapter: Adapter,
    base: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    on_progress: OnProgress = no_progress,
) -> list[str]:
    """Writes a standalone Hugging Face MixtralForCausalLM that computes what the mixture on its base computes.

        expert e:  w1, w2, w3 = W + s_e B_e A_e of gate_proj, down_proj, up_proj;  gate = R / router_temperature
        elsewhere: W + s B A where there is plain LoRA, else W

    Sums are computed in float32 and rounded to the dtype written. One tensor is in memory at a time.

    Args:
        adapter: scope ffn, softmax, top-k renormalised or dense.
        base: its base model's directory, Llama or Mistral.
        directory: new or empty.
        dtype: "float32", "bfloat16" or "float16"; None keeps each tensor's own.
        max_shard_bytes: largest file.
        on_progress: called with (done, total) in tensors written.

    Returns:
        What differs, one line each.

    Raises:
        CheckpointError: the adapter or the base is not of this kind (every reason is listed), something is in
            `directory`, or the disk refuses.
    """
    path = require_empty(directory)
    if dtype is not None and dtype not in STORED:
        raise CheckpointError("cannot be exported", [f"dtype: found {dtype!r}, expected one of {', '.join(STORED)}"])
    with BaseModel(base) as model:
        problems = adapter_problems(adapter) + (wrong := base_problems(model))
        if not wrong:
            problems += fit_problems(adapter, model)
        if problems:
            raise CheckpointError("this mixture cannot be written as a Mixtral", problems)
        plan = {name: _cast(tensor, dtype) for name, tensor in _plan(adapter, model)}
        config = _config(adapter, model, plan)
        notes = _notes(adapter, plan)
        text = readme("Mixtral from a mixture of LoRA experts", _WHAT, notes, adapter.config, is_model=True)
        writers: dict[str, Callable[[Path], Any]] = shard_writers(_counted(plan, on_progress), max_shard_bytes)
        writers["config.json"] = lambda target: target.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        writers["README.md"] = lambda target: target.write_text(text, "utf-8")
        writers |= {source.name: partial(shutil.copyfile, source) for source in model.copied()}
        replace_files(path, writers)
    return notes


_WHAT = "A standalone model: every expert's feed-forward block is merged with its base weights, the router is kept."


def _notes(adapter: Adapter, plan: Plan) -> list[str]:
    dtypes = sorted({t.dtype.name for t in plan.values()})
    notes = [
        "Nothing of the mixture is lost, but the experts are no longer low-rank: the model is several times larger."
    ]
    if dtypes != ["float32"]:
        notes.append(f"Weights and routers are rounded to {', '.join(dtypes)}; the mixture adds its deltas unrounded.")
    if adapter.config.router_jitter_noise or adapter.config.lora_dropout or adapter.config.expert_dropout:
        notes.append("Dropout and router jitter, which act in training only, are not in the model.")
    return notes


def _plan(adapter: Adapter, base: BaseModel) -> Iterator[tuple[str, Lazy]]:
    """Every tensor of the Mixtral, layer by layer, in the order of the base's names."""
    routed = {block_of(m): m for m in adapter.routed}
    experts = adapter.config.for_module(next(iter(routed.values()))).num_experts
    for name in sorted(base.infos, key=_order):
        if INERT.fullmatch(name) or (name == _HEAD and base.config.get("tie_word_embeddings")):
            continue
        module = name.removesuffix(".weight")
        block, _, projection = module.rpartition(".")
        if block not in routed:
            yield name, _planned(base.infos[name], partial(_merged, adapter, base, module, 0))
            continue
        moe = block.removesuffix("mlp") + "block_sparse_moe"
        for expert in range(experts):
            key = f"{moe}.experts.{expert}.{PROJECTIONS[projection]}.weight"
            yield key, _planned(base.infos[name], partial(_merged, adapter, base, module, expert))
        if projection == "gate_proj":
            info = TensorInfo(base.infos[name].dtype, (experts, base.infos[name].shape[1]))
            yield f"{moe}.gate.weight", _planned(info, partial(_router, adapter, block))
    if base.config.get("tie_word_embeddings"):  # an untied copy, which every reader of Mixtral understands
        yield _HEAD, _planned(base.infos[_EMBEDDING], partial(base.read, _EMBEDDING))


def _planned(info: TensorInfo, make: Callable[[], np.ndarray]) -> Lazy:
    return Lazy(np.dtype(NUMPY[info.dtype]), info.shape, make)


def _order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _merged(adapter: Adapter, base: BaseModel, module: str, expert: int) -> np.ndarray:
    """W, or W + s_e B_e A_e in float32, for expert e (or the only one)."""
    weight = base.read(f"{module}.weight")
    if (module, "lora_B") not in adapter.tensors:
        return weight
    sizes = adapter.config.for_module(module)
    index = expert if sizes.has_router else 0
    a = np.asarray(adapter.tensors[module, "lora_A"][0 if sizes.shared_lora_A else index], np.float32)
    b = np.asarray(adapter.tensors[module, "lora_B"][index], np.float32)
    return weight.astype(np.float32) + np.float32(sizes.scalings[index]) * (b @ a)


def _router(adapter: Adapter, block: str) -> np.ndarray:
    return np.asarray(adapter.tensors[block, "router"], np.float32) / np.float32(adapter.config.router_temperature)


def _counted(plan: Plan, on_progress: OnProgress) -> Plan:
    """The same plan; each tensor reports when it is made."""
    done = itertools.count(1)

    def made(tensor: Lazy) -> np.ndarray:
        array = tensor.read()
        on_progress(next(done), len(plan))
        return array

    return {name: replace(tensor, read=partial(made, tensor)) for name, tensor in plan.items()}


def _cast(tensor: Lazy, dtype: str | None) -> Lazy:
    """In the dtype given, or in its own: a sum is made in float32."""
    to = np.dtype(dtype) if dtype else tensor.dtype
    return Lazy(to, tensor.shape, lambda: tensor.read().astype(to))


def _config(adapter: Adapter, base: BaseModel, plan: Plan) -> dict[str, Any]:
    stated, routed = base.config, adapter.routed[0]
    is_mistral = stated["architectures"] == ["MistralForCausalLM"]
    defaults = _SHARED | (_MISTRAL if is_mistral else {})
    sizes = adapter.config.for_module(routed)
    dtypes = {t.dtype.name for t in plan.values()}
    fields = {name: stated.get(name, default) for name, default in defaults.items()}
    # transformers 5 calls it rope_parameters, with rope_theta inside; the older spelling is read by everyone
    rope = {**(stated.get("rope_scaling") or stated.get("rope_parameters") or {})}
    fields["rope_theta"] = rope.pop("rope_theta", fields["rope_theta"])
    is_scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **fields,
        "num_key_value_heads": fields["num_key_value_heads"] or fields["num_attention_heads"],
        "head_dim": fields["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"],
        "rope_scaling": rope if is_scaled else None,
        "sliding_window": stated.get("sliding_window", 4096) if is_mistral else None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "num_local_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.top_k or sizes.num_experts,
        "output_router_logits": False,
        "router_aux_loss_coef": adapter.config.router_aux_loss_coef,
        "router_jitter_noise": 0.0,
        "torch_dtype": dtypes.pop() if len(dtypes) == 1 else stated.get("torch_dtype") or stated.get("dtype"),
    }


def shard_writers(plan: Plan, max_bytes: int) -> dict[str, Callable[[Path], None]]:
    """{file name: function that writes it}: one file, or shards of at most `max_bytes` (or one tensor) and an index."""
    shards: list[Plan] = [{}]
    for name, tensor in plan.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        return {"model.safetensors": _writer(plan)}
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(t.nbytes for t in plan.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2) + "\n"
    writers = {name: _writer(shard) for name, shard in zip(names, shards, strict=True)}
    return {**writers, "model.safetensors.index.json": lambda path: path.write_text(text, "utf-8")}


def _writer(shard: Plan) -> Callable[[Path], None]:
    return lambda path: write_in_order(path, shard, {"format": "pt"})
