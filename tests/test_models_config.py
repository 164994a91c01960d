"""config.json: old and new spellings mean the same, and what cannot be honoured is refused by name."""

import math

import pytest

from moe_lora_interop.errors import ConfigError
from moe_lora_jax.models import DecoderConfig, RopeConfig, load_base_model
from moe_lora_jax.models.rope import NO_ROPE
from tests.hf import LLAMA3_ROPE, Saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory)


@pytest.fixture
def copy_of(saved, tmp_path):
    """case -> a copy of that saved model that the test may damage."""
    return lambda case: saved.copy(case, tmp_path)


def test_old_spelling_of_the_config_gives_the_same_model(copy_of):
    for case in ("llama_theta_1e6", "llama3_rope", "gemma3"):
        config, _, write = copy_of(case)
        new = load_base_model(write()).config
        ropes = config.pop("rope_parameters")
        config["torch_dtype"] = config.pop("dtype")
        if case == "gemma3":
            config |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None}
        else:
            config["rope_theta"] = ropes.pop("rope_theta")
            kind = ropes.pop("rope_type")
            config["rope_scaling"] = None if kind == "default" else {"type": kind, **ropes}
        assert load_base_model(write()).config == new


def test_absent_fields_take_the_defaults_of_the_family(copy_of):
    """Files from the hub leave out what equals the class default."""
    for case, absent in (
        ("llama_tied", ["rope_parameters", "head_dim", "attention_bias", "mlp_bias", "hidden_act", "rms_norm_eps"]),
        ("gemma3", ["rope_parameters", "tie_word_embeddings", "hidden_activation", "attention_bias"]),
        ("qwen2", ["use_sliding_window", "sliding_window", "max_window_layers", "layer_types"]),
    ):
        config, _, write = copy_of(case)
        complete = load_base_model(write()).config
        for name in absent:
            config.pop(name, None)
        assert load_base_model(write()).config == complete


_SIZES = dict(vocab_size=9, hidden_size=64, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize(
    ("published", "wanted"),
    [
        (  # meta-llama/Llama-3.2-1B-Instruct
            dict(
                architectures=["LlamaForCausalLM"],
                head_dim=16,
                num_key_value_heads=2,
                rope_theta=500000.0,
                rope_scaling=dict(
                    factor=32.0,
                    high_freq_factor=4.0,
                    low_freq_factor=1.0,
                    original_max_position_embeddings=8192,
                    rope_type="llama3",
                ),
                max_position_embeddings=131072,
                tie_word_embeddings=True,
                pretraining_tp=1,
                eos_token_id=[128001, 128008, 128009],
                torch_dtype="bfloat16",
            ),
            dict(
                layer_ropes=(
                    RopeConfig(
                        theta=5e5,
                        rope_type="llama3",
                        factor=32.0,
                        low_freq_factor=1.0,
                        high_freq_factor=4.0,
                        original_max_position_embeddings=8192,
                    ),
                )
                * 2,
                eos_token_id=(128001, 128008, 128009),
                dtype="bfloat16",
                tie_word_embeddings=True,
            ),
        ),
        (  # Qwen/Qwen2.5-0.5B
            dict(
                architectures=["Qwen2ForCausalLM"],
                num_key_value_heads=2,
                max_window_layers=1,
                sliding_window=32768,
                use_sliding_window=False,
                use_mrope=False,
                rope_theta=1000000.0,
                tie_word_embeddings=True,
            ),
            dict(layer_windows=(None, None), qkv_bias=True, output_bias=False, head_dim=16),
        ),
        (  # mistralai/Mistral-7B-v0.3, and HuggingFaceTB/SmolLM2-135M
            dict(architectures=["MistralForCausalLM"], num_key_value_heads=2, sliding_window=None, rope_theta=1e6),
            dict(layer_windows=(None, None), qkv_bias=False, tie_word_embeddings=False),
        ),
        (
            dict(
                architectures=["LlamaForCausalLM"],
                is_llama_config=True,
                rope_interleaved=False,
                rope_scaling=None,
                rope_theta=100000,
                num_key_value_heads=1,
                attention_dropout=0.0,
            ),
            dict(layer_ropes=(RopeConfig(theta=1e5),) * 2, num_key_value_heads=1, norm="rms"),
        ),
        (  # google/gemma-2-2b, and google/gemma-3-4b's text_config
            dict(
                architectures=["Gemma2ForCausalLM"],
                head_dim=16,
                hidden_act="gelu_pytorch_tanh",
                hidden_activation="gelu_pytorch_tanh",
                cache_implementation="hybrid",
                attn_logit_softcapping=50.0,
                final_logit_softcapping=30.0,
                query_pre_attn_scalar=256,
                sliding_window=4096,
                rope_theta=10000.0,
            ),
            dict(
                layer_windows=(4096, None),
                attention_scale=1 / 16,
                embedding_scale=8.0,
                num_key_value_heads=4,
                tie_word_embeddings=True,
                pad_token_id=0,
            ),
        ),
        (
            dict(
                architectures=["Gemma3ForCausalLM"],
                head_dim=16,
                sliding_window_pattern=2,
                sliding_window=1024,
                rope_theta=1000000.0,
                rope_local_base_freq=10000.0,
                rope_scaling=dict(factor=8.0, rope_type="linear"),
            ),
            dict(
                layer_windows=(1024, None),
                layer_ropes=(RopeConfig(theta=1e4), RopeConfig(theta=1e6, rope_type="linear", factor=8.0)),
                final_logit_softcapping=None,
                qk_norm="head",
            ),
        ),
        (  # microsoft/Phi-4-mini-instruct, with shorter lists
            dict(
                architectures=["Phi3ForCausalLM"],
                attention_bias=False,
                embd_pdrop=0.0,
                full_attn_mod=1,
                interpolate_factor=1,
                lm_head_bias=False,
                max_position_embeddings=131072,
                original_max_position_embeddings=4096,
                num_key_value_heads=2,
                partial_rotary_factor=0.75,
                rope_scaling=dict(long_factor=[1, 2, 3, 4, 5, 6.5], short_factor=[1] * 6, type="longrope"),
                rope_theta=10000.0,
                sliding_window=262144,
                tie_word_embeddings=True,
            ),
            dict(
                fused=True,
                layer_windows=(262144,) * 2,
                layer_ropes=(
                    RopeConfig(
                        theta=1e4,
                        share=0.75,
                        rope_type="longrope",
                        short_factor=(1,) * 6,
                        long_factor=(1, 2, 3, 4, 5, 6.5),
                        attention_factor=math.sqrt(1 + math.log(32) / math.log(4096)),
                        original_max_position_embeddings=4096,
                    ),
                )
                * 2,
            ),
        ),
        (  # allenai/Olmo-3-7B-Instruct
            dict(
                architectures=["Olmo3ForCausalLM"],
                layer_types=["sliding_attention", "full_attention"],
                rope_scaling=dict(
                    attention_factor=1.2079441541679836,
                    beta_fast=32.0,
                    beta_slow=1.0,
                    factor=8.0,
                    original_max_position_embeddings=8192,
                    rope_type="yarn",
                ),
                rope_theta=500000,
                sliding_window=4096,
                max_position_embeddings=65536,
            ),
            dict(
                layer_windows=(4096, None),
                qk_norm="width",
                norm_eps=1e-5,
                layer_ropes=(
                    RopeConfig(theta=5e5),
                    RopeConfig(
                        theta=5e5,
                        rope_type="yarn",
                        factor=8.0,
                        attention_factor=1.2079441541679836,
                        original_max_position_embeddings=8192,
                    ),
                ),
            ),
        ),
        (  # HuggingFaceTB/SmolLM3-3B, and ibm-granite/granite-3.3-2b-instruct
            dict(
                architectures=["SmolLM3ForCausalLM"],
                no_rope_layers=[1, 0],
                no_rope_layer_interval=4,
                layer_types=["full_attention"] * 2,
                use_sliding_window=False,
                sliding_window=None,
                rope_theta=5000000.0,
                pretraining_tp=2,
            ),
            dict(layer_ropes=(RopeConfig(theta=5e6), NO_ROPE), layer_windows=(None, None), pad_token_id=128004),
        ),
        (
            dict(
                architectures=["GraniteForCausalLM"],
                attention_multiplier=0.015625,
                embedding_multiplier=12.0,
                logits_scaling=8.0,
                residual_multiplier=0.22,
                rope_theta=10000000.0,
                rope_scaling=None,
            ),
            dict(attention_scale=1 / 64, embedding_multiplier=12, logits_scaling=8, residual_multiplier=0.22),
        ),
        (  # google/gemma-2b, whose "gelu" always meant the tanh form, and allenai/OLMo-2-0425-1B
            dict(architectures=["GemmaForCausalLM"], head_dim=16, hidden_act="gelu", num_key_value_heads=1),
            dict(hidden_act="gelu_pytorch_tanh", attention_scale=1 / 4, embedding_scale=8.0, norm="rms_plus_one"),
        ),
        (
            dict(architectures=["Olmo2ForCausalLM"], rms_norm_eps=1e-06, rope_theta=500000, rope_scaling=None),
            dict(layer_ropes=(RopeConfig(theta=5e5),) * 2, norm="rms_wide", tie_word_embeddings=False),
        ),
        (  # CohereLabs/c4ai-command-r7b-12-2024
            dict(
                architectures=["Cohere2ForCausalLM"],
                logit_scale=0.25,
                num_key_value_heads=2,
                order_of_interleaved_layers="local_attn_first",
                position_embedding_type="rope_gptj",
                rope_theta=50000,
                rotary_pct=1.0,
                sliding_window=4096,
                sliding_window_pattern=2,
                use_embedding_sharing=True,
                use_gated_activation=True,
                use_parallel_block=True,
                use_parallel_embedding=True,
            ),
            dict(layer_ropes=(RopeConfig(theta=5e4), NO_ROPE), layer_windows=(4096, None), logits_scaling=4.0),
        ),
        (  # Ministral3Config() of transformers, which mistralai/Ministral-3-3B-Base-2512's text_config is like
            dict(architectures=["Ministral3ForCausalLM"], head_dim=16, num_key_value_heads=2),
            dict(
                layer_ropes=(
                    RopeConfig(
                        theta=1e6,
                        rope_type="yarn",
                        factor=16.0,
                        original_max_position_embeddings=16384,
                        query_beta=0.1,
                    ),
                )
                * 2,
            ),
        ),
    ],
)
def test_published_spellings_are_understood(published, wanted):
    config = DecoderConfig.from_hf(_SIZES | published)
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_gemma_layer_pattern_is_derived_when_not_listed():
    config = _SIZES | dict(architectures=["Gemma3ForCausalLM"], num_hidden_layers=7)
    assert DecoderConfig.from_hf(config).layer_windows == (4096,) * 5 + (None, 4096)
    assert DecoderConfig.from_hf(config | {"sliding_window_pattern": 2}).layer_windows == (4096, None) * 3 + (4096,)
    assert DecoderConfig.from_hf(config).layer_ropes[5] == RopeConfig(theta=1e6)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("llama", dict(architectures=["GPT2LMHeadModel"]), "architectures: .*GPT2LMHeadModel.*Gemma2ForCausalLM"),
        ("llama", dict(architectures=None), r"architectures: found \[\], expected one of "),
        ("llama", dict(hidden_act="quick_gelu"), "hidden_act: found 'quick_gelu', expected one of .*silu"),
        ("llama", dict(rope_parameters=dict(rope_type="proportional")), "rope_type: found 'proportional'"),
        ("llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0)), "rope_type: found 'dynamic', expected"),
        ("llama", dict(rope_parameters=dict(rope_type="linear")), "rope_parameters.factor: found None, expected a pos"),
        (
            "llama",
            dict(rope_parameters=dict(LLAMA3_ROPE, high_freq_factor=1.0)),
            "high_freq_factor: found 1.0, expected more",
        ),
        ("llama", dict(rope_parameters=dict(rope_theta=1e4, factor=8.0)), "rope_parameters.factor: found 8.0"),
        ("llama", dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor: found 0.5, expected"),
        ("llama", dict(rope_parameters=dict(rope_theta="x")), "rope_parameters.rope_theta: found 'x', expected a"),
        ("llama", dict(rope_parameters=[1]), r"rope_parameters: found \[1\], expected an object or null"),
        (
            "llama",
            dict(rope_theta=5e5),
            "rope_theta: found 500000.0, expected 10000.0 as in rope_parameters",
        ),
        (
            "llama",
            dict(rope_scaling=dict(type="linear", factor=2.0)),
            "rope_scaling: found .* that of rope_parameters",
        ),
        ("llama", dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))), "rope_parameters: .*one flat"),
        ("gemma3", dict(rope_parameters=dict(rope_theta=1e4)), "rope_parameters: .*nested under full_attention"),
        ("llama", dict(rope_interleaved=True), "rope_interleaved: found True, expected None or False"),
        ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor: found 0.5, expected None or 1"),
        ("llama", dict(quantization_config=dict(bits=4)), "quantization_config: found .*, expected None"),
        ("llama", dict(attention_dropout=0.1), "attention_dropout: found 0.1, expected None or 0"),
        ("llama", dict(sliding_window=5), "sliding_window: found 5, expected None"),
        ("llama", dict(layer_types=["sliding_attention"] * 2), "layer_types: found .*, expected full_attention"),
        ("mistral", dict(attention_bias=True), "attention_bias: found True, expected False"),
        ("qwen2", dict(attention_bias=False), "attention_bias: found False, expected True"),
        ("qwen2", dict(mlp_bias=True), "mlp_bias: found True, expected False"),
        ("qwen2", dict(layer_types=["full_attention"]), "layer_types: found .*, expected .* each of 2 layers"),
        ("qwen2", dict(layer_types=["linear_attention"] * 2), "layer_types: found .*, expected full_attention or"),
        ("qwen2", dict(layer_types=["sliding_attention"] * 2), "use_sliding_window: found False"),
        ("gemma3", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping: found 50.0, expected None"),
        ("gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention: found True"),
        ("llama", dict(final_logit_softcapping=30.0), "final_logit_softcapping: found 30.0, expected None"),
        ("llama", dict(num_key_value_heads=3), "num_key_value_heads: found 3, expected a divisor of .* 4"),
        ("llama", dict(head_dim=None, num_attention_heads=6, num_key_value_heads=2), "found 6, expected a divisor of"),
        ("llama", dict(head_dim=7), "head_dim: found 7, expected an even number"),
        ("llama", dict(rms_norm_eps=None), "rms_norm_eps: found None, expected a positive number"),
        ("llama", dict(tie_word_embeddings="no"), "tie_word_embeddings: found 'no', expected true or"),
        ("llama", dict(eos_token_id="</s>"), "eos_token_id: found '</s>', expected null, a token"),
        ("llama", dict(dtype="float8_e4m3fn"), "dtype: found 'float8_e4m3fn', expected one of"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(case, change, message, copy_of):
    config, _, write = copy_of(case)
    config.update(change)
    with pytest.raises(ConfigError, match=message):
        load_base_model(write())


def test_a_token_id_of_minus_one_means_none(copy_of):
    """As the first Llama configs say it; no row of the embedding has this number."""
    config, _, write = copy_of("llama")
    config |= {"pad_token_id": -1, "eos_token_id": [2, -1]}
    read = load_base_model(write()).config
    assert (read.pad_token_id, read.eos_token_id) == (None, (2,))
    config |= {"pad_token_id": -2}
    with pytest.raises(ConfigError, match="pad_token_id: found -2, expected null, a token id or a list"):
        load_base_model(write())


def test_all_wrong_fields_are_in_one_error():
    with pytest.raises(ConfigError) as caught:
        DecoderConfig.from_hf({"architectures": ["LlamaForCausalLM"], "hidden_size": 0, "vocab_size": True})
    named = {problem.partition(":")[0] for problem in caught.value.problems}
    assert named == {"hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
