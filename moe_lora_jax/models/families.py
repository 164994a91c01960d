"""What distinguishes the supported Hugging Face families: one table, read by config.py and nothing else.

Everything here is a fact of a transformers class that config.json does not state: the defaults of fields that the file
may leave out, which biases exist, how layers alternate. A new family of the same shape is a new entry.

Source: transformers/models/{llama,mistral,qwen2,qwen3,gemma2,gemma3}/{configuration,modeling}_*.py@5.24.0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_lora_jax.models.fields import Fields

FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture. Flags default to Llama's behaviour.

    Attributes:
        defaults: the class's defaults for the fields that are read and may be absent from config.json.
        layer_types: (fields, number of layers) -> attention kind of each layer, when the file does not list them.
        reads_layer_types: the class honours a `layer_types` list; otherwise one that disagrees is refused.
        reads_sliding_window: the class honours `sliding_window`; otherwise a non-null one is refused.
        attention_bias: biases of (q, k, v) and o; None where the field `attention_bias` decides on all four.
        reads_mlp_bias: the field `mlp_bias` decides; otherwise a true one is refused.
        activation_field: the field that names the activation.
        qk_norm: RMSNorm over head_dim on queries and keys, before the rotation.
        gemma: (1 + w) norms, embeddings scaled by sqrt(hidden_size), query_pre_attn_scalar, norms after the
            attention and around the feed-forward block.
        attention_softcap: the class applies `attn_logit_softcapping`; otherwise a non-null one is refused.
        rope_theta: default rotary base, by attention kind.
        rope_per_kind: `rope_parameters` is nested by attention kind; `rope_scaling` and `rope_theta` mean full layers.
    """

    defaults: Mapping[str, Any]
    layer_types: Callable[[Fields, int], tuple[str, ...]]
    reads_layer_types: bool = False
    reads_sliding_window: bool = True
    attention_bias: tuple[bool, bool] | None = None
    reads_mlp_bias: bool = False
    activation_field: str = "hidden_act"
    qk_norm: bool = False
    gemma: bool = False
    attention_softcap: bool = False
    rope_theta: Mapping[str, float] = field(default_factory=lambda: {FULL: 1e4, SLIDING: 1e4})
    rope_per_kind: bool = False


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

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        defaults={**_COMMON, "eos_token_id": 2, "max_position_embeddings": 2048},
        layer_types=_all_full,
        reads_sliding_window=False,
        reads_mlp_bias=True,
    ),
    "MistralForCausalLM": Family(
        defaults={**_COMMON, "num_key_value_heads": 8, "sliding_window": 4096, "eos_token_id": 2},
        layer_types=_all_sliding_if_window,
        attention_bias=(False, False),
    ),
    "Qwen2ForCausalLM": Family(
        defaults=_QWEN,
        layer_types=_sliding_from_layer,
        reads_layer_types=True,
        attention_bias=(True, False),
    ),
    "Qwen3ForCausalLM": Family(
        defaults={**_QWEN, "head_dim": 128},
        layer_types=_sliding_from_layer,
        reads_layer_types=True,
        qk_norm=True,
    ),
    "Gemma2ForCausalLM": Family(
        defaults={**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        layer_types=_every_nth_full(2),
        reads_layer_types=True,
        activation_field="hidden_activation",
        gemma=True,
        attention_softcap=True,
    ),
    "Gemma3ForCausalLM": Family(
        defaults=_GEMMA,
        layer_types=_every_nth_full(6),
        reads_layer_types=True,
        activation_field="hidden_activation",
        qk_norm=True,
        gemma=True,
        rope_theta={FULL: 1e6, SLIDING: 1e4},
        rope_per_kind=True,
    ),
}
