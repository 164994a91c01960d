"""Whether a mixture on a base model is a Mixtral model, and every reason why it is not."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from moe_lora_interop.checkpoint.adapter import Adapter
from moe_lora_interop.config.modules import block_of
from moe_lora_interop.disk.model_directory import BaseModel

PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_MODULES = (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}" for p in PROJECTIONS))
INERT = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# Fields of the base's config that change what it computes and that Mixtral lacks, with the values that change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "attention_dropout": (None, 0, 0.0),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}


def base_problems(base: BaseModel) -> list[str]:
    """Why this base model's layers are not those of Mixtral."""
    config = base.config
    architectures = config.get("architectures")
    if architectures not in [[name] for name in ARCHITECTURES]:
        expected = " or ".join(ARCHITECTURES)
        return [f"base: architectures {architectures!r}, expected {expected}: others do not map onto Mixtral"]
    problems = [
        f"base: {name}: found {config[name]!r}, Mixtral has no such thing"
        for name, neutral in _NEUTRAL.items()
        if config.get(name) not in neutral
    ]
    if architectures[0] == "LlamaForCausalLM" and config.get("sliding_window") is not None:
        problems.append(f"base: sliding_window: found {config['sliding_window']!r}, which Llama ignores")
    layers = config.get("num_hidden_layers")
    # checked first: the names below are made in memory, and config.json may say any number
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= len(base.infos):
        most = f"a number from 1 to {len(base.infos)}, of tensors in the files"
        return [*problems, f"base: num_hidden_layers: found {layers!r}, expected {most}"]
    expected_names = base_names(layers)
    if not config.get("tie_word_embeddings"):
        expected_names.add("lm_head.weight")
    problems += [f"base: {name}: missing tensor" for name in sorted(expected_names - base.infos.keys())]
    extra = sorted(n for n in base.infos.keys() - expected_names - {"lm_head.weight"} if not INERT.fullmatch(n))
    problems += [f"base: {name}: unexpected tensor, Mixtral has none like it" for name in extra]
    return problems


def base_names(layers: int) -> set[str]:
    """The tensors of a Llama or Mistral of this many layers, without the head."""
    norms = ("input_layernorm", "post_attention_layernorm")
    of_layers = {f"model.layers.{n}.{m}.weight" for n in range(layers) for m in (*_MODULES, *norms)}
    return of_layers | {"model.embed_tokens.weight", "model.norm.weight"}


def adapter_problems(adapter: Adapter) -> list[str]:
    """Why this mixture's routing is not that of Mixtral, whatever the base."""
    c = adapter.config
    top_ks = {sizes.top_k for sizes in c.for_modules(adapter.routed).values()}
    dense = top_ks <= {None}
    reasons = (
        (c.scope != "ffn", f"scope: found {c.scope}, expected ffn: Mixtral mixes whole feed-forward blocks"),
        (c.router_bias, "router_bias: found true, expected false: Mixtral's router has none"),
        (c.threshold is not None, f"threshold: found {c.threshold}, expected null: Mixtral selects by top-k"),
        (c.top_p is not None, f"top_p: found {c.top_p}, expected null: Mixtral selects by top-k alone"),
        (
            c.entropy_threshold is not None,
            f"entropy_threshold: found {c.entropy_threshold}, expected null: Mixtral selects by top-k alone",
        ),
        (c.routing is not None, f"routing: found {c.routing}, expected null: Mixtral has only a softmax and top-k"),
        (c.scoring_func != "softmax", f"scoring_func: found {c.scoring_func}, expected softmax"),
        (
            c.temperature_hidden_size is not None,
            f"temperature_hidden_size: found {c.temperature_hidden_size}, expected null: Mixtral's router has no "
            "temperature",
        ),
        (not c.norm_topk_prob and not dense, "norm_topk_prob: found false, expected true: Mixtral renormalises"),
        (c.routed_scaling_factor != 1, f"routed_scaling_factor: found {c.routed_scaling_factor}, expected 1"),
        (bool(c.modules_to_save), f"modules_to_save: found {c.modules_to_save}, expected null"),
    )
    return [reason for applies, reason in reasons if applies]


def fit_problems(adapter: Adapter, base: BaseModel) -> Iterator[str]:
    """Why the mixture's modules are not those of a Mixtral made from this base."""
    layers = base.config["num_hidden_layers"]
    sizes = adapter.config.for_modules(adapter.modules)
    routed = {m: sizes[m] for m in adapter.routed}
    features = adapter.features
    yield from _varying("num_experts", {block_of(m): s.num_experts for m, s in routed.items()})
    yield from _varying("top_k", {block_of(m): s.top_k for m, s in routed.items()})
    blocks = {f"model.layers.{n}.mlp" for n in range(layers)}
    missing = sorted(blocks - {block_of(m) for m in routed})
    yield from (f"{block}: has no mixture, and in Mixtral every layer has one" for block in missing)
    for module, of_module in sizes.items():
        name, info = module.rpartition(".")[2], base.infos.get(f"{module}.weight")
        shape = features[module][::-1]
        if info is None:
            yield f"{module}: the base model has no such layer"
        elif info.shape != shape:
            yield f"{module}: the adapter is for [out, in] = {list(shape)}, the base has {list(info.shape)}"
        elif module == "model.embed_tokens":
            yield f"{module}: the embeddings are no linear layer"
        elif of_module.has_router and (block_of(module) not in blocks or name not in PROJECTIONS):
            yield f"{module}: has {of_module.num_experts} experts, and Mixtral has them only in feed-forward blocks"


def _varying(name: str, values: Mapping[str, int | None]) -> Iterator[str]:
    if len(set(values.values())) > 1:
        found = ", ".join(f"{block}: {value}" for block, value in sorted(values.items()))
        yield f"{name}: differs by layer ({found}), and Mixtral has one for all"
