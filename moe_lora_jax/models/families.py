"""What distinguishes the supported Hugging Face families: one table, read by config.py and nothing else.

Everything here is a fact of a transformers class that config.json does not state: the defaults of fields that the file
may leave out, which biases exist, how layers alternate. A new family of the same shape is a new entry.

Source: transformers/models/{family}/{configuration,modeling}_*.py@5.24.0.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from moe_lora_jax.models.fields import Fields

FULL = "full_attention"
SLIDING = "sliding_attention"

QKNorm = Literal["head", "width"]
NormKind = Literal["rms", "rms_wide", "rms_plus_one", "layer"]


class LayerNorms(NamedTuple):
    """The norms of a decoder layer by name; None where there is none. `shared`: the feed-forward block reads what
    the attention reads, and both are added to the layer's input."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None
    shared: bool = False


_ATTENTION, _FEED_FORWARD = "post_attention_layernorm", "post_feedforward_layernorm"
# Llama calls the norm BEFORE its feed-forward block `post_attention_layernorm`.
BEFORE = LayerNorms("input_layernorm", None, _ATTENTION, None)
AFTER = LayerNorms(None, _ATTENTION, None, _FEED_FORWARD)
SHARED = LayerNorms("input_layernorm", None, None, None, shared=True)
AROUND = LayerNorms("input_layernorm", _ATTENTION, "pre_feedforward_layernorm", _FEED_FORWARD)


ONLY_INERT: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "attention_dropout": (None, 0),
    "resid_pdrop": (None, 0),
    "embd_pdrop": (None, 0),
    "partial_rotary_factor": (None, 1),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "use_bidirectional_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "sliding_window": (None,),
    "no_rope_layers": (None,),
    "no_rope_layer_interval": (None,),
    "clip_qkv": (None,),
    "use_qk_norm": (None, False),
    "lm_head_bias": (None, False),
    "mlp_bias": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
}
"""Fields that change what a model computes, and the values with which they change nothing."""

LayerTypes = Callable[[Fields, int], tuple[str, ...]]


def _all_rotated(fields: Fields, kinds: Sequence[str]) -> tuple[bool, ...]:
    return (True,) * len(kinds)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture. Flags default to Llama's behaviour.

    Attributes:
        model_type: what config.json calls it.
        defaults: the class's defaults for the fields that are read and may be absent from config.json.
        layer_types: (fields, number of layers) -> attention kind of each layer, when the file does not list them.
        rotated: (fields, attention kinds) -> whether each layer is rotated.
        reads: those of `ONLY_INERT` that the class honours, and `layer_types` if it honours a list of them.
        inert: more fields that the class ignores and others might not, with the values that mean what it computes.
        attention_bias: biases of (q, k, v) and o; None where the field `attention_bias` decides on all four.
        activation_field: the field that names the activation.
        activations: {name there: the activation meant}, where they differ.
        fused: q, k and v are one linear layer, `qkv_proj`, and gate and up another, `gate_up_proj`.
        qk_norm: norms of queries and keys before the rotation, of each "head" or of the whole "width".
        norms: where a layer has norms.
        norm: what a norm computes, see `norm.Norm`.
        norm_eps_field: the field with its epsilon.
        scales_embeddings: embeddings are multiplied by sqrt(hidden_size), rounded to their dtype.
        rope_theta: default rotary base, by attention kind.
        rope_per_kind: `rope_parameters` is nested by attention kind; `rope_scaling` and `rope_theta` mean full layers.
        local_theta_field: with `rope_per_kind`, the field with the base of sliding layers, if there is one.
        rope_default: `rope_parameters` of a file that has neither these nor `rope_scaling`.
        rope_types: {name in the file: the kind of frequencies meant} of those that the class knows.
        rope_pairs: the rotation turns neighbours, not one component of each half.
        scales_queries: `llama_4_scaling_beta` among the rotary parameters scales queries by their positions.
    """

    model_type: str
    defaults: Mapping[str, Any]
    layer_types: LayerTypes
    rotated: Callable[[Fields, Sequence[str]], tuple[bool, ...]] = _all_rotated
    reads: frozenset[str] = frozenset()
    inert: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    attention_bias: tuple[bool, bool] | None = None
    activation_field: str = "hidden_act"
    activations: Mapping[str, str] = field(default_factory=dict)
    fused: bool = False
    qk_norm: QKNorm | None = None
    norms: LayerNorms = BEFORE
    norm: NormKind = "rms"
    norm_eps_field: str = "rms_norm_eps"
    scales_embeddings: bool = False
    rope_theta: Mapping[str, float] = field(default_factory=lambda: {FULL: 1e4, SLIDING: 1e4})
    rope_per_kind: bool = False
    local_theta_field: str | None = None
    rope_default: Mapping[str, Any] = field(default_factory=dict)
    rope_types: Mapping[str, str] = field(
        default_factory=lambda: {name: name for name in ("default", "linear", "llama3", "yarn")}
    )
    rope_pairs: bool = False
    scales_queries: bool = False


def _all_full(fields: Fields, layers: int) -> tuple[str, ...]:
    return (FULL,) * layers


def _all_sliding_if_window(fields: Fields, layers: int) -> tuple[str, ...]:
    return (FULL if fields.get("sliding_window") is None else SLIDING,) * layers


def _sliding_from_layer(fields: Fields, layers: int) -> tuple[str, ...]:
    """Qwen: the layers from `max_window_layers` on slide, and only when `use_sliding_window`."""
    windowed = fields.flag("use_sliding_window") and fields.get("sliding_window") is not None
    first = fields.integer("max_window_layers", minimum=0) if windowed else layers
    return tuple(FULL if layer < first else SLIDING for layer in range(layers))


def _every_nth_full(nth: int) -> Callable[[Fields, int], tuple[str, ...]]:
    """Gemma: every nth layer is full; Gemma 3 files may state another n as `sliding_window_pattern`."""

    def layer_types(fields: Fields, layers: int) -> tuple[str, ...]:
        n = nth if fields.get("sliding_window_pattern") is None else fields.integer("sliding_window_pattern")
        return tuple(SLIDING if (layer + 1) % n else FULL for layer in range(layers))

    return layer_types


def _rotated_by_layer(fields: Fields, kinds: Sequence[str]) -> tuple[bool, ...]:
    """SmolLM3: as `no_rope_layers` says, 0 where a layer is not rotated, or else each `no_rope_layer_interval`th."""
    stated = fields.get("no_rope_layers")
    if stated is None:
        nth = fields.integer("no_rope_layer_interval")
        return tuple((layer + 1) % nth != 0 for layer in range(len(kinds)))
    if not isinstance(stated, list | tuple) or len(stated) < len(kinds) or any(flag not in (0, 1) for flag in stated):
        fields.refuse("no_rope_layers", f"found {stated!r}, expected 0 or 1 for each of {len(kinds)} layers")
        return (True,) * len(kinds)
    return tuple(bool(flag) for flag in stated[: len(kinds)])


def _sliding_if_not_rotated(fields: Fields, layers: int) -> tuple[str, ...]:
    """SmolLM3: layers without rotation slide, and only when `use_sliding_window`."""
    windowed = fields.flag("use_sliding_window") and fields.get("sliding_window") is not None
    rotated = _rotated_by_layer(fields, (FULL,) * layers)
    return tuple(SLIDING if windowed and not turns else FULL for turns in rotated)


def _rotated_if_sliding(fields: Fields, kinds: Sequence[str]) -> tuple[bool, ...]:
    return tuple(kind == SLIDING for kind in kinds)


_COMMON: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "head_dim": None,
    "num_key_value_heads": None,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN = {
    **_COMMON,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {
    **_COMMON,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_WINDOW = frozenset({"sliding_window"})
_GEMMA_READS = _WINDOW | {"layer_types", "query_pre_attn_scalar", "final_logit_softcapping"}
_MULTIPLIERS = frozenset({"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"})
_OLMO = {**_COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "pad_token_id": 1, "eos_token_id": 50279}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        defaults={**_COMMON, "eos_token_id": 2, "max_position_embeddings": 2048},
        layer_types=_all_full,
        reads=frozenset({"mlp_bias"}),
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        defaults={**_COMMON, "num_key_value_heads": 8, "sliding_window": 4096, "eos_token_id": 2},
        layer_types=_all_sliding_if_window,
        reads=_WINDOW,
        attention_bias=(False, False),
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2",
        defaults=_QWEN,
        layer_types=_sliding_from_layer,
        reads=_WINDOW | {"layer_types"},
        attention_bias=(True, False),
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        defaults={**_QWEN, "head_dim": 128},
        layer_types=_sliding_from_layer,
        reads=_WINDOW | {"layer_types"},
        qk_norm="head",
    ),
    "Gemma2ForCausalLM": Family(
        model_type="gemma2",
        defaults={**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        layer_types=_every_nth_full(2),
        reads=_GEMMA_READS | {"attn_logit_softcapping"},
        activation_field="hidden_activation",
        norms=AROUND,
        norm="rms_plus_one",
        scales_embeddings=True,
    ),
    "Gemma3ForCausalLM": Family(
        model_type="gemma3_text",
        defaults=_GEMMA,
        layer_types=_every_nth_full(6),
        reads=_GEMMA_READS,
        activation_field="hidden_activation",
        qk_norm="head",
        norms=AROUND,
        norm="rms_plus_one",
        scales_embeddings=True,
        rope_theta={FULL: 1e6, SLIDING: 1e4},
        rope_per_kind=True,
        local_theta_field="rope_local_base_freq",
    ),
    "GemmaForCausalLM": Family(
        model_type="gemma",
        defaults={
            **_COMMON,
            "hidden_act": "gelu_pytorch_tanh",
            "num_key_value_heads": 16,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "max_position_embeddings": 8192,
        },
        layer_types=_all_full,
        inert={"hidden_activation": (None, "gelu_pytorch_tanh")},
        activations={"gelu": "gelu_pytorch_tanh"},
        norm="rms_plus_one",
        scales_embeddings=True,
    ),
    "GraniteForCausalLM": Family(
        model_type="granite",
        defaults={
            **_COMMON,
            **dict.fromkeys(_MULTIPLIERS, 1.0),
            "eos_token_id": 2,
            "max_position_embeddings": 2048,
        },
        layer_types=_all_full,
        reads=_MULTIPLIERS | {"mlp_bias"},
    ),
    "SmolLM3ForCausalLM": Family(
        model_type="smollm3",
        defaults={
            **_COMMON,
            "num_key_value_heads": 4,
            "use_sliding_window": False,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
            "max_position_embeddings": 32768,
            "pad_token_id": 128004,
            "eos_token_id": 128001,
        },
        layer_types=_sliding_if_not_rotated,
        rotated=_rotated_by_layer,
        reads=_WINDOW | {"layer_types", "no_rope_layers", "no_rope_layer_interval", "mlp_bias"},
        rope_theta={FULL: 2e6, SLIDING: 2e6},
    ),
    "Olmo2ForCausalLM": Family(
        model_type="olmo2",
        defaults=_OLMO,
        layer_types=_all_full,
        qk_norm="width",
        norms=AFTER,
        norm="rms_wide",
    ),
    "Olmo3ForCausalLM": Family(
        model_type="olmo3",
        defaults={**_OLMO, "sliding_window": 4096},
        layer_types=_every_nth_full(4),
        reads=_WINDOW | {"layer_types"},
        inert={"sliding_window_pattern": (None, 4)},
        qk_norm="width",
        norms=AFTER,
        norm="rms_wide",
        rope_theta={FULL: 5e5, SLIDING: 5e5},
        rope_per_kind=True,
    ),
    "Ministral3ForCausalLM": Family(
        model_type="ministral3",
        defaults={
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "pad_token_id": 11,
            "eos_token_id": 2,
        },
        layer_types=_all_sliding_if_window,
        reads=_WINDOW,
        attention_bias=(False, False),
        rope_default={
            "type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
        scales_queries=True,
    ),
    "Phi3ForCausalLM": Family(
        model_type="phi3",
        defaults={
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 32000,
            "eos_token_id": 32000,
        },
        layer_types=_all_sliding_if_window,
        reads=_WINDOW | {"partial_rotary_factor"},
        attention_bias=(False, False),
        inert={"full_attn_mod": (None, 1)},
        fused=True,
        rope_types={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
    ),
    "Cohere2ForCausalLM": Family(
        model_type="cohere2",
        defaults={
            **_COMMON,
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.0625,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 255001,
        },
        layer_types=_every_nth_full(4),
        rotated=_rotated_if_sliding,
        reads=_WINDOW | {"layer_types", "logit_scale"},
        inert={
            "use_parallel_block": (None, True),
            "use_gated_activation": (None, True),
            "position_embedding_type": (None, "rope_gptj"),
            "rotary_pct": (None, 1),
        },
        norms=SHARED,
        norm="layer",
        norm_eps_field="layer_norm_eps",
        rope_pairs=True,
    ),
}
