"""Mixture-of-experts base models: mixtures on their linear layers, and a word on the experts that stay as they are."""

import warnings

import peft
import pytest
import torch
from test_peft_support import THIRD_PARTY_WARNINGS, config, input_ids, logits, tiny_llama
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moe_lora_interop.errors import ConfigError
from moe_lora_interop.peft_tuner.checks import untouched_experts
from moe_lora_interop.peft_tuner.layer import Linear

pytestmark = THIRD_PARTY_WARNINGS
SIZES = dict(
    vocab_size=97,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    pad_token_id=0,
)


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).eval()


def qwen3():
    """Its first layer is dense."""
    torch.manual_seed(0)
    settings = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, head_dim=8, mlp_only_layers=[0])
    return Qwen3MoeForCausalLM(settings).eval()


@pytest.mark.parametrize(("base", "dense", "routed"), [(mixtral, 0, 2), (qwen3, 3, 1)], ids=["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("scope", ["linear", "model"])
def test_all_linear_takes_what_is_linear_and_names_the_rest(tmp_path, base, dense, routed, scope):
    plain = base()
    expected, total = logits(plain), sum(p.numel() for p in plain.parameters())
    fused = {n: p.numel() for n, p in plain.named_parameters() if ".experts." in n and p.ndim == 3}
    with pytest.warns(UserWarning) as found:
        model = peft.get_peft_model(plain, config(target_modules="all-linear", scope=scope))
    (message,) = [str(w.message) for w in found if "fused experts" in str(w.message)]
    assert "model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj" in message or (
        "model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj" in message
    )
    assert f"({2 * routed} parameters, {sum(fused.values()) / total:.1%} of the base model)" in message
    assert sum(isinstance(m, Linear) for m in model.modules()) == 8 + dense
    model.train()(input_ids(), labels=input_ids()).loss.backward()
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".experts." in n)
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.moe_lora_B["default"])
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        again = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(again), logits(model.eval()))
    assert not torch.equal(logits(again), expected)
    assert torch.equal(logits(again.unload()), expected)


def test_nothing_is_said_without_experts_or_without_all_linear():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        peft.get_peft_model(tiny_llama(), config(target_modules="all-linear"))
        peft.get_peft_model(mixtral(), config(target_modules=["q_proj"]))


def test_convolutions_are_no_experts():
    assert not untouched_experts(torch.nn.Sequential(torch.nn.Conv1d(2, 2, 2), torch.nn.Linear(2, 2)))


def test_a_block_of_fused_experts_cannot_be_a_mixture_of_blocks():
    with pytest.raises(ConfigError):
        peft.get_peft_model(mixtral(), config(scope="ffn", target_modules=["gate_up_proj", "down_proj"]))
