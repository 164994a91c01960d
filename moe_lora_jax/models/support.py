"""Which base models there are and what is special about each: `python -m moe_lora_jax.models` prints it."""

from dataclasses import replace

from moe_lora_jax.models.attending import cudnn, splash
from moe_lora_jax.models.config import DecoderConfig
from moe_lora_jax.models.families import AFTER, AROUND, BEFORE, FAMILIES, SHARED, Family
from moe_lora_jax.models.rope import NO_ROPE

LAYERS = 12
_SIZES = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "dtype": "bfloat16",
}
_NORMS = {
    BEFORE: "",
    AROUND: "norms around each half of a layer",
    AFTER: "norms after each half of a layer",
    SHARED: "both halves of a layer side by side",
}
_KINDS = {"rms": "", "rms_wide": "", "rms_plus_one": "norms times 1 + w", "layer": "layer norm"}
_QK = {None: "", "head": "norms of q and k", "width": "norms of q and k over all heads"}
_FIELDS = (
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "logit_scale",
    "partial_rotary_factor",
)
"""Those that most classes do not read."""


def families() -> dict[str, str]:
    """{what a family is called: its class in transformers}"""
    return {architecture.removesuffix("ForCausalLM"): architecture for architecture in FAMILIES}


def support_table() -> str:
    """A row of Markdown for each family, from its flags and what its class does where config.json says nothing."""
    lines = ["| family | `model_type` | unlike Llama | frequencies | kernels: TPU, GPU |", "|---|---|---|---|---|"]
    for name, architecture in families().items():
        family = FAMILIES[architecture]
        config = DecoderConfig.from_hf({**_SIZES, "architectures": [architecture]})
        special = ", ".join(_special(family, config))
        frequencies = ", ".join(sorted(set(family.rope_types.values())))
        lines.append(f"| {name} | `{family.model_type}` | {special} | {frequencies} | {_kernels(config)} |")
    return "\n".join(lines)


def _special(family: Family, config: DecoderConfig) -> list[str]:
    windows = sum(window is not None for window in config.layer_windows)
    unrotated = config.layer_ropes.count(NO_ROPE)
    found = [
        _NORMS[family.norms],
        _KINDS[family.norm],
        _QK[family.qk_norm],
        "`qkv_proj` and `gate_up_proj`" if family.fused else "",
        "biases of q, k, v" if family.attention_bias == (True, False) else "",
        f"windows in {windows} of {LAYERS} layers" if windows else "",
        f"no rotation in {unrotated} of {LAYERS} layers" if unrotated else "",
        "neighbours are rotated" if family.rope_pairs else "",
        "queries scaled by position" if family.scales_queries else "",
        "scaled embeddings" if family.scales_embeddings else "",
        *(f"`{name}`" for name in _FIELDS if name in family.reads),
    ]
    return [words for words in found if words]


def _kernels(config: DecoderConfig) -> str:
    gpu = "none" if cudnn.unsuited(config) else "cuDNN"
    return f"{'none' if splash.unable(replace(config, dtype='bfloat16'), 'tpu') else 'splash'}, {gpu}"
