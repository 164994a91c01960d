"""A mixture of feed-forward blocks on a Llama or Mistral computes what a Mixtral computes: written as one."""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.config.modules import block_of
from moe_lora_interop.disk.atomic import replace_files, require_empty
from moe_lora_interop.disk.files import TensorInfo
from moe_lora_interop.disk.model_directory import BaseModel
from moe_lora_interop.errors import CheckpointError
from moe_lora_interop.export.mixtral_checks import INERT, PROJECTIONS, adapter_problems, base_problems, fit_problems
from moe_lora_interop.export.readme import readme
from moe_lora_interop.progress import OnProgress, no_progress

ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its name, dtype and shape are known; `make` computes its values when it is written."""

    name: str
    info: TensorInfo
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.info.shape) * ITEMSIZE[self.info.dtype]


NUMPY = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
STORED = {name: stored for stored, name in NUMPY.items()}
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
        plan = [_cast(tensor, dtype) for tensor in _plan(adapter, model)]
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


def _notes(adapter: Adapter, plan: list[Planned]) -> list[str]:
    dtypes = sorted({NUMPY[t.info.dtype] for t in plan})
    notes = [
        "Nothing of the mixture is lost, but the experts are no longer low-rank: the model is several times larger."
    ]
    if dtypes != ["float32"]:
        notes.append(f"Weights and routers are rounded to {', '.join(dtypes)}; the mixture adds its deltas unrounded.")
    if adapter.config.router_jitter_noise or adapter.config.lora_dropout or adapter.config.expert_dropout:
        notes.append("Dropout and router jitter, which act in training only, are not in the model.")
    return notes


def _plan(adapter: Adapter, base: BaseModel) -> Iterator[Planned]:
    """Every tensor of the Mixtral, layer by layer, in the order of the base's names."""
    routed = {block_of(m): m for m in adapter.config.routed(adapter.modules)}
    experts = adapter.config.for_module(next(iter(routed.values()))).num_experts
    for name in sorted(base.infos, key=_order):
        if INERT.fullmatch(name) or (name == _HEAD and base.config.get("tie_word_embeddings")):
            continue
        module = name.removesuffix(".weight")
        block, _, projection = module.rpartition(".")
        if block not in routed:
            yield Planned(name, base.infos[name], partial(_merged, adapter, base, module, 0))
            continue
        moe = block.removesuffix("mlp") + "block_sparse_moe"
        for expert in range(experts):
            key = f"{moe}.experts.{expert}.{PROJECTIONS[projection]}.weight"
            yield Planned(key, base.infos[name], partial(_merged, adapter, base, module, expert))
        if projection == "gate_proj":
            info = TensorInfo(base.infos[name].dtype, (experts, base.infos[name].shape[1]))
            yield Planned(f"{moe}.gate.weight", info, partial(_router, adapter, block))
    if base.config.get("tie_word_embeddings"):  # an untied copy, which every reader of Mixtral understands
        yield Planned(_HEAD, base.infos[_EMBEDDING], partial(base.read, _EMBEDDING))


def _order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _merged(adapter: Adapter, base: BaseModel, module: str, expert: int) -> np.ndarray:
    """W, or W + s_e B_e A_e in float32, for expert e (or the only one)."""
    weight = base.read(f"{module}.weight")
    if (module, "lora_B") not in adapter.tensors:
        return weight
    sizes = adapter.config.for_module(module)
    index = expert if sizes.has_router else 0
    a = adapter.tensors[module, "lora_A"][0 if sizes.shared_lora_A else index].astype(np.float32)
    b = adapter.tensors[module, "lora_B"][index].astype(np.float32)
    return weight.astype(np.float32) + np.float32(sizes.scalings[index]) * (b @ a)


def _router(adapter: Adapter, block: str) -> np.ndarray:
    rows = adapter.tensors[block, "router"].astype(np.float32)
    return rows / np.float32(adapter.config.router_temperature)


def _counted(plan: list[Planned], on_progress: OnProgress) -> list[Planned]:
    """The same plan; each tensor reports when it is made."""
    done = itertools.count(1)

    def made(tensor: Planned) -> np.ndarray:
        array = tensor.make()
        on_progress(next(done), len(plan))
        return array

    return [replace(tensor, make=partial(made, tensor)) for tensor in plan]


def _cast(tensor: Planned, dtype: str | None) -> Planned:
    info = TensorInfo(STORED[dtype] if dtype else tensor.info.dtype, tensor.info.shape)
    return Planned(tensor.name, info, lambda: tensor.make().astype(NUMPY[info.dtype]))


def _config(adapter: Adapter, base: BaseModel, plan: list[Planned]) -> dict[str, Any]:
    stated, routed = base.config, adapter.config.routed(adapter.modules)[0]
    is_mistral = stated["architectures"] == ["MistralForCausalLM"]
    defaults = _SHARED | (_MISTRAL if is_mistral else {})
    sizes = adapter.config.for_module(routed)
    dtypes = {NUMPY[t.info.dtype] for t in plan}
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


def shard_writers(plan: Sequence[Planned], max_bytes: int) -> dict[str, Callable[[Path], None]]:
    """{file name: function that writes it}: one file, or shards of at most `max_bytes` (or one tensor) and an index."""
    shards: list[list[Planned]] = [[]]
    for tensor in plan:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return {"model.safetensors": _writer(shards[0])}
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for t in plan)}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2) + "\n"
    writers = {name: _writer(shard) for name, shard in zip(names, shards, strict=True)}
    return {**writers, "model.safetensors.index.json": lambda path: path.write_text(text, "utf-8")}


def _writer(tensors: Sequence[Planned]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        ordered = sorted(tensors, key=lambda t: -ITEMSIZE[t.info.dtype])  # values stay aligned
        for tensor in ordered:
            start, end = end, end + tensor.nbytes
            header[tensor.name] = {"dtype": tensor.info.dtype, "shape": tensor.info.shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in ordered:
                array = tensor.make()
                assert (array.shape, array.nbytes) == (tensor.info.shape, tensor.nbytes), tensor.name
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    return write
