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


def test_a_block_of_fused_experts_cannot_be_a_mixture_of_blocks():
    with pytest.raises(ConfigError):
        peft.get_peft_model(mixtral(), config(scope="ffn", target_modules=["gate_up_proj", "down_proj"]))


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = SIZES | {"num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**sizes))


def dbrx():
    from transformers import DbrxConfig, DbrxForCausalLM

    sizes = dict(d_model=16, n_heads=2, n_layers=2, vocab_size=97, attn_config={"rope_theta": 1e4})
    ffn = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}
    return DbrxForCausalLM(DbrxConfig(**sizes, ffn_config=ffn))


def vit():
    from transformers import ViTConfig, ViTModel

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4))


def convolutions():
    return torch.nn.Sequential(torch.nn.Conv1d(2, 2, 2), torch.nn.ConvTranspose1d(2, 2, 2), torch.nn.Linear(2, 2))


def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    conv = dict(conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4)
    return Wav2Vec2Model(Wav2Vec2Config(**sizes, **conv, num_conv_pos_embedding_groups=2))


BOTH = {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("base", "names", "layers"),
    [
        (mixtral, BOTH, 2),
        (qwen3, BOTH, 1),
        (gpt_oss, BOTH, 2),
        (dbrx, {"w1", "v1", "w2"}, 2),
        (vit, set(), 0),
        (convolutions, set(), 0),
        (wav2vec2, set(), 0),
        (tiny_llama, set(), 0),
    ],
)
def test_fused_experts_are_told_from_other_parameters(base, names, layers):
    found = untouched_experts(base())
    assert {name.rsplit(".", 1)[-1] for name in found} == names
    assert len(found) == len(names) * layers


@pytest.mark.parametrize("base", [mixtral, gpt_oss])
@pytest.mark.parametrize(
    "targets", [["q_proj", "gate_up_proj"], ["mlp.experts.down_proj"], ["experts"], r".*experts\.gate_up_proj"]
)
def test_a_target_that_is_fused_is_called_so(base, targets):
    with pytest.raises(ConfigError, match=r"experts\..* \(and \d more\) holds all experts of a layer") as error:
        peft.get_peft_model(base(), config(target_modules=targets))
    assert len(error.value.problems) == 1 and "did you mean" not in str(error.value)


def test_all_linear_says_nothing_of_tokens_and_positions():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        peft.get_peft_model(vit(), config(target_modules="all-linear"))
