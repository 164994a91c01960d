"""PEFT and this library both sort JSON, so what a pattern means may not depend on the order of its keys."""

import peft

import moe_lora_interop
import moe_lora_interop.peft_tuner as tuner
from tests.hf import make_model

OVERLAPPING = {"q_proj": 2, ".*": 7}  # the first match wins; sorted, ".*" would come first


def test_a_save_by_peft_keeps_the_first_match(tmp_path):
    config = tuner.MoeLoraConfig(
        r=2, num_experts=3, alpha_pattern=OVERLAPPING, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    peft.get_peft_model(make_model("llama"), config).save_pretrained(tmp_path)
    saved = moe_lora_interop.read(tmp_path).config
    assert saved.for_module("model.layers.0.self_attn.q_proj").alphas == (2, 2, 2)
    assert saved.for_module("model.layers.0.self_attn.v_proj").alphas == (7, 7, 7)
