"""The description of a decoder that the modules read: config.json with every family difference resolved."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_lora_interop.disk.dtypes import STORED
from moe_lora_interop.errors import ConfigError
from moe_lora_jax.models.activations import ACTIVATIONS
from moe_lora_jax.models.families import FAMILIES, FULL, ONLY_INERT, SLIDING, Family, LayerNorms, NormKind, QKNorm
from moe_lora_jax.models.fields import Fields
from moe_lora_jax.models.rope import NO_ROPE, RopeConfig
from moe_lora_jax.models.rope_fields import read_ropes

MAX_LAYERS = 1024  # several times what any model has; layers are built before the files are checked


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer. Hashable, so that it is static under jit.

    Names are config.json's where it has one. Derived:
        head_dim: width of one head; num_attention_heads * head_dim need not equal hidden_size.
        qkv_bias, output_bias, mlp_bias: which linears have a bias.
        fused: q, k, v are one linear, gate and up another.
        qk_norm, layer_norms, norm, norm_eps: which norms there are, and what they compute.
        embedding_scale: factor on the embeddings, rounded to their dtype. attention_scale: factor on the scores.
        logits_scaling: divisor of the logits.
        layer_windows: per layer, how many tokens back a query sees, itself included; None is all.
        layer_ropes: per layer, its rotary parameters. rope_pairs: they turn neighbours, not one of each half.
        eos_token_id: all ids that end a text (config.json may state one or several).
        dtype: of the weights, and so of the computation. name_or_path: where it was read from; not compared.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    fused: bool
    qk_norm: QKNorm | None
    layer_norms: LayerNorms
    norm: NormKind
    norm_eps: float
    embedding_scale: float | None
    embedding_multiplier: float
    residual_multiplier: float
    attention_scale: float
    logits_scaling: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    layer_windows: tuple[int | None, ...]
    layer_ropes: tuple[RopeConfig, ...]
    rope_pairs: bool
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str = "float32"
    name_or_path: str | None = field(default=None, compare=False)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, name_or_path: str | None = None) -> "DecoderConfig":
        """Read the dict of a Hugging Face config.json.

        Fields that the transformers class itself does not read are ignored, like there; a field that it reads, or
        that other implementations read, is honoured or refused.

        Raises:
            ConfigError: unsupported architecture, or one line for each field that is missing, malformed or beyond
                what this decoder computes.
        """
        architecture, family = _family(config)
        fields = Fields(config, family.defaults)
        for name, inert in {**ONLY_INERT, **family.inert}.items():
            if name not in family.reads and fields.get(name) not in inert:
                fields.refuse(name, f"found {fields.get(name)!r}, expected {' or '.join(map(repr, inert))}")

        layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
        hidden_size, head_dim, heads, key_value_heads = _widths(fields)
        qkv_bias, output_bias, mlp_bias = _biases(fields, family)
        windows, kinds = _windows(fields, family, layers)
        ropes = read_ropes(fields, family, head_dim)
        rotated = family.rotated(fields, kinds)
        result = cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            hidden_act=_activation(fields, family),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            mlp_bias=mlp_bias,
            fused=family.fused,
            qk_norm=family.qk_norm,
            layer_norms=family.norms,
            norm=family.norm,
            norm_eps=fields.number(family.norm_eps_field),
            embedding_scale=math.sqrt(hidden_size) if family.scales_embeddings else None,
            embedding_multiplier=_multiplier(fields, family, "embedding_multiplier"),
            residual_multiplier=_multiplier(fields, family, "residual_multiplier"),
            attention_scale=_attention_scale(fields, family, head_dim),
            attn_logit_softcapping=fields.optional_number("attn_logit_softcapping"),
            final_logit_softcapping=fields.optional_number("final_logit_softcapping"),
            logits_scaling=_multiplier(fields, family, "logits_scaling") / _multiplier(fields, family, "logit_scale"),
            layer_windows=windows,
            layer_ropes=tuple(ropes[kind] if turns else NO_ROPE for kind, turns in zip(kinds, rotated, strict=True)),
            rope_pairs=family.rope_pairs,
            eos_token_id=fields.token_ids("eos_token_id"),
            pad_token_id=next(iter(fields.token_ids("pad_token_id")), None),
            dtype=fields.get("dtype") or fields.get("torch_dtype") or "float32",
            name_or_path=name_or_path,
        )
        if result.dtype not in STORED:
            fields.refuse("dtype", f"found {result.dtype!r}, expected one of {', '.join(STORED)}")
        if fields.problems:
            raise ConfigError(f"this {architecture} is not supported", fields.problems)
        return result


def _family(config: Mapping[str, Any]) -> tuple[str, Family]:
    architectures = config.get("architectures") or []
    for name, family in FAMILIES.items():
        if architectures == [name]:
            return name, family
    hint = "in PyTorch, the PEFT method MOE_LORA takes any model: import moe_lora_interop.peft_tuner"
    problem = f"architectures: found {architectures!r}, expected one of {', '.join(sorted(FAMILIES))}"
    raise ConfigError("unsupported model", [problem, hint])


def _widths(fields: Fields) -> tuple[int, int, int, int]:
    """hidden_size, head_dim, num_attention_heads, num_key_value_heads."""
    known = len(fields.problems)
    hidden_size = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    shared = heads if fields.get("num_key_value_heads") is None else fields.integer("num_key_value_heads")
    if heads % shared:
        fields.refuse("num_key_value_heads", f"found {shared}, expected a divisor of num_attention_heads {heads}")
    if fields.get("head_dim") is not None:
        head_dim = fields.integer("head_dim")
    else:
        head_dim = hidden_size // heads
        if hidden_size % heads:
            fields.refuse(
                "num_attention_heads", f"found {heads}, expected a divisor of hidden_size {hidden_size}, or head_dim"
            )
    if head_dim % 2 and len(fields.problems) == known:  # otherwise it may come from a stand-in
        fields.refuse("head_dim", f"found {head_dim}, expected an even number: rotary embeddings turn pairs")
    return hidden_size, head_dim, heads, shared


def _biases(fields: Fields, family: Family) -> tuple[bool, bool, bool]:
    stated = fields.flag("attention_bias")
    qkv, output = (stated, stated) if family.attention_bias is None else family.attention_bias
    if "attention_bias" in fields.stated and stated != qkv:
        fields.refuse("attention_bias", f"found {stated}, expected {qkv} for the q, k and v of this architecture")
    return qkv, output, "mlp_bias" in family.reads and fields.flag("mlp_bias")


def _activation(fields: Fields, family: Family) -> str:
    name = fields.get(family.activation_field)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        fields.refuse(family.activation_field, f"found {name!r}, expected one of {', '.join(sorted(ACTIVATIONS))}")
        return "silu"
    return family.activations.get(name, name)


def _multiplier(fields: Fields, family: Family, name: str) -> float:
    return fields.number(name) if name in family.reads else 1.0


def _attention_scale(fields: Fields, family: Family, head_dim: int) -> float:
    if "attention_multiplier" in family.reads:
        return fields.number("attention_multiplier")
    return (fields.number("query_pre_attn_scalar") if "query_pre_attn_scalar" in family.reads else head_dim) ** -0.5


def _windows(fields: Fields, family: Family, layers: int) -> tuple[tuple[int | None, ...], tuple[str, ...]]:
    """Per layer: the window, and the attention kind (which also selects the rotary parameters)."""
    kinds = family.layer_types(fields, layers)
    stated = fields.get("layer_types")
    if stated is not None and not (isinstance(stated, list | tuple) and all(isinstance(kind, str) for kind in stated)):
        fields.refuse("layer_types", f"found {stated!r}, expected a list of names")
    elif stated is not None and tuple(stated) != kinds:
        if "layer_types" not in family.reads:
            fields.refuse("layer_types", f"found {list(stated)}, expected {' or '.join(sorted(set(kinds)))} throughout")
        elif len(stated) != layers or not set(stated) <= {FULL, SLIDING}:
            fields.refuse("layer_types", f"found {stated}, expected {FULL} or {SLIDING} for each of {layers} layers")
        else:
            kinds = tuple(stated)
    if SLIDING not in kinds:
        return (None,) * layers, kinds
    if fields.get("use_sliding_window") is False:
        fields.refuse("use_sliding_window", f"found False, expected True: layer_types has {SLIDING}")
    window = fields.integer("sliding_window")
    return tuple(window if kind == SLIDING else None for kind in kinds), kinds
