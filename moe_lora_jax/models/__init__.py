"""Decoder-only base models in Flax NNX, read from local Hugging Face directories."""

from moe_lora_jax.models.abstract import abstract_base_model as abstract_base_model
from moe_lora_jax.models.cache import KVCache as KVCache
from moe_lora_jax.models.causal_lm import CausalLM as CausalLM
from moe_lora_jax.models.config import DecoderConfig as DecoderConfig
from moe_lora_jax.models.decoding import generate as generate
from moe_lora_jax.models.loading import load_base_model as load_base_model
from moe_lora_jax.models.rope import RopeConfig as RopeConfig
