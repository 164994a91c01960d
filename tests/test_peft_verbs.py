"""What a PEFT user does with a model, one test per verb."""

import copy
import pickle
import re

import packaging.version
import peft
import pytest
import torch
import transformers
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_peft_support import (
    LLAMA,
    THIRD_PARTY_WARNINGS,
    config,
    input_ids,
    logits,
    tiny_classifier,
    tiny_llama,
)
from transformers import LlamaConfig, LlamaForTokenClassification, LlamaModel, T5Config, T5ForConditionalGeneration

import moe_lora_interop.peft_tuner as tuner
from moe_lora_interop.errors import ConfigError
from moe_lora_interop.peft_tuner.layer import MoeLoraLayer

pytestmark = THIRD_PARTY_WARNINGS

T5 = {
    "vocab_size": 97,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
ADAPTERS = {
    "first": {"num_experts": 3, "r": 2, "top_k": 2},
    "second": {"num_experts": 5, "r": [1, 2, 3, 4, 5], "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "third": {"num_experts": 1, "r": 4, "target_modules": "all-linear"},
}


def wrapped(**fields) -> peft.PeftModel:
    return peft.get_peft_model(tiny_llama(), config(**fields)).eval()


def several() -> peft.PeftModel:
    """A model with the three ADAPTERS; the first is active."""
    model = peft.get_peft_model(tiny_llama(), config(**ADAPTERS["first"]), adapter_name="first")
    model.add_adapter("second", config(**ADAPTERS["second"]))
    model.add_adapter("third", config(**ADAPTERS["third"]))
    return model.eval()


def saved(path, **fields) -> peft.PeftModel:
    model = wrapped(**fields)
    model.save_pretrained(path)
    return model


@pytest.fixture
def base_dir(tmp_path):
    """A directory with the tiny base model, for the loaders that find it through the adapter's config."""
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_get_peft_model_trains_the_adapter_and_nothing_else():
    model = wrapped()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if ".moe_lora_" in n}
    assert not torch.equal(logits(model), logits(tiny_llama()))
    untrained = wrapped(init_lora_weights=True)
    assert torch.equal(logits(untrained), logits(tiny_llama()))
    status = model.get_model_status()
    assert status.peft_types == {"default": "MOE_LORA"} and status.num_adapter_layers == 4


def test_default_targets_are_those_of_lora():
    model = peft.get_peft_model(tiny_llama(), tuner.MoeLoraConfig())
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}


def test_all_linear_is_every_linear_but_the_head():
    model = wrapped(target_modules="all-linear")
    layers = [n for n, m in model.named_modules() if isinstance(m, MoeLoraLayer)]
    assert len(layers) == 14 and not any("lm_head" in n for n in layers)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("name", ["default", "mine"])
def test_from_pretrained(tmp_path, is_trainable, name):
    model = saved(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name=name, is_trainable=is_trainable)
    assert again.training is False or is_trainable
    assert {p.requires_grad for n, p in again.named_parameters() if "moe_lora_" in n} == {is_trainable}
    assert torch.equal(logits(again.eval()), logits(model))


@pytest.mark.filterwarnings(  # peft 0.21.2 renames the base in every wrapped config
    "ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning"
)
def test_auto_peft_model(tmp_path, base_dir):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    model = peft.get_peft_model(base, config(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(again) is peft.PeftModelForCausalLM
    assert torch.equal(logits(again), logits(model))


def test_several_adapters_of_different_sizes():
    model = several()
    outputs = {}
    for name, fields in ADAPTERS.items():
        model.set_adapter(name)
        outputs[name] = logits(model)
        alone = peft.get_peft_model(tiny_llama(), config(**fields), adapter_name=name).eval()
        peft.set_peft_model_state_dict(alone, get_peft_model_state_dict(model, adapter_name=name), adapter_name=name)
        assert torch.equal(logits(alone), outputs[name])
    with pytest.warns(UserWarning, match="third was active which is now deleted"):
        model.delete_adapter("third")
    assert "third" not in model.peft_config
    assert not any("third" in n for n, _ in model.named_modules()) and not any("third" in n for n in model.state_dict())
    layers = [m for m in model.modules() if isinstance(m, MoeLoraLayer)]
    assert not any("third" in m.moe_lora_config or "third" in m.moe_lora_module_config for m in layers)
    model.set_adapter("second")
    assert torch.equal(logits(model), outputs["second"])


def test_adding_an_adapter_leaves_the_active_one_trainable_and_the_new_one_frozen():
    model = several()
    for n, p in model.named_parameters():
        assert p.requires_grad == ("moe_lora_" in n and ".first" in n)
    model.set_adapter("second")
    for n, p in model.named_parameters():
        assert p.requires_grad == ("moe_lora_" in n and ".second" in n)


def test_deltas_of_several_active_adapters_add_up():
    model = several()
    model.base_model.set_adapter(["first", "third"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, 32)
    expected = layer.base_layer(x) + layer._delta("first", x) + layer._delta("third", x)
    torch.testing.assert_close(layer(x), expected)


def test_load_adapter_several_times(tmp_path):
    model = several()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "first", adapter_name="first")
    for name in ("second", "third"):
        again.load_adapter(tmp_path / name, name)
    for name in ADAPTERS:
        model.set_adapter(name)
        again.set_adapter(name)
        assert torch.equal(logits(again), logits(model))


def test_disable_adapter():
    model = wrapped()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    assert not torch.equal(logits(model), logits(tiny_llama()))


def test_mixed_batches():
    model = several()
    names = ["second", "__base__", "first", "third", "second"]
    ids = input_ids(batch=5)
    with torch.no_grad():
        mixed = model(ids, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(ids[row : row + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(ids[row : row + 1]).logits
            torch.testing.assert_close(mixed[row : row + 1], alone)
    assert torch.equal(logits(model), logits(model))  # no hook is left behind


@pytest.mark.parametrize("beams", [1, 2])
def test_mixed_batches_generate(beams):
    model = several()
    names, ids = ["first", "__base__", "second"], input_ids(batch=3)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "do_sample": False}
    mask = torch.ones_like(ids)
    mixed = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **options)
    for row in (0, 2):
        model.set_adapter(names[row])
        one = slice(row, row + 1)
        assert torch.equal(mixed[one], model.generate(input_ids=ids[one], attention_mask=mask[one], **options))


def test_mixed_batches_in_an_encoder_decoder_with_beams():
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(**T5))
    model = peft.get_peft_model(
        base, config(target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM"), adapter_name="first"
    )
    model.add_adapter("second", config(target_modules=["q", "wo"], num_experts=2))
    model.eval()
    names, ids = ["second", "first"], input_ids()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "do_sample": False}
    mixed = model.generate(input_ids=ids, adapter_names=names, **options)
    for row, name in enumerate(names):
        model.set_adapter(name)
        assert torch.equal(mixed[row : row + 1], model.generate(input_ids=ids[row : row + 1], **options))


@pytest.mark.parametrize(
    ("names", "train", "message"),
    [
        (
            ["first", "forth"],
            False,
            "Trying to infer with non-existing adapter.*: forth .this model has first, second, third",
        ),
        (["first", "second"], True, "Cannot pass `adapter_names` when the model is in training mode"),
        (["first"], False, "Length of `adapter_names` should be the same as the number of inputs, but got 1 and 2"),
    ],
)
def test_mixed_batch_refusals(names, train, message):
    with pytest.raises(ValueError, match=message):
        several().train(train)(input_ids(), adapter_names=names)


def test_modules_to_save(tmp_path):
    model = wrapped(modules_to_save=["lm_head"])
    assert model.base_model.model.lm_head.modules_to_save["default"].weight.requires_grad
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("task", "make", "model_cls"),
    [
        ("SEQ_CLS", tiny_classifier, peft.PeftModelForSequenceClassification),
        (
            "TOKEN_CLS",
            lambda: LlamaForTokenClassification(LlamaConfig(**LLAMA, num_labels=3)),
            peft.PeftModelForTokenClassification,
        ),
        ("FEATURE_EXTRACTION", lambda: LlamaModel(LlamaConfig(**LLAMA)), peft.PeftModelForFeatureExtraction),
        ("CAUSAL_LM", tiny_llama, peft.PeftModelForCausalLM),
    ],
)
def test_task_types(tmp_path, task, make, model_cls):
    torch.manual_seed(0)
    base = make().eval()
    state = copy.deepcopy(base.state_dict())
    model = peft.get_peft_model(base, config(task_type=task)).eval()
    assert type(model) is model_cls
    model.save_pretrained(tmp_path)
    fresh = make()
    fresh.load_state_dict(state)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids())[0], model(input_ids())[0])
    model.train()(input_ids())[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    gradients = []
    for checkpoint in (False, True):
        model = wrapped(top_k=2).train()
        if checkpoint:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(input_ids(), labels=input_ids()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # torch's own compiler internals
@pytest.mark.parametrize(
    "fields", [{"top_k": 2, "router_aux_loss_coef": 0.1}, {"threshold": 0.5, "adaptive_threshold": True}]
)
def test_compile_whole_graph(fields):
    model = wrapped(**fields)
    eager = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids()).logits, eager)
    model.train()
    loss = compiled(input_ids(), labels=input_ids()).loss + model.moe_lora_aux_loss()
    loss.backward()
    compiled_gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    (model(input_ids(), labels=input_ids()).loss + model.moe_lora_aux_loss()).backward()
    for ours, theirs in zip(compiled_gradients, [p.grad for p in model.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    model = wrapped(top_k=2, router_aux_loss_coef=0.1).train()
    model(input_ids())  # leaves a routing behind
    again = copied(model).eval()
    assert torch.equal(logits(again), logits(model.eval()))
    assert again.peft_config == model.peft_config
    again.add_adapter("other", config())
    assert "other" not in model.peft_config


def test_inject_adapter_in_model():
    injected = peft.inject_adapter_in_model(config(top_k=2), tiny_llama()).eval()
    assert sum(isinstance(m, MoeLoraLayer) for m in injected.modules()) == 4
    assert not torch.equal(logits(injected), logits(tiny_llama()))


@pytest.mark.parametrize("fields", [{}, {"top_k": 1}, {"threshold": 0.5, "adaptive_threshold": True}])
@pytest.mark.filterwarnings("ignore:.*cannot learn")
def test_generate_with_and_without_cache(fields):
    model = wrapped(**fields)
    ids = input_ids()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with_cache = model.generate(input_ids=ids, use_cache=True, **options)
    assert with_cache.shape == (2, 15)
    assert torch.equal(with_cache, model.generate(input_ids=ids, use_cache=False, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_bases(dtype, autocast):
    model = peft.get_peft_model(tiny_llama(dtype), config(top_k=2), autocast_adapter_dtype=autocast).train()
    adapter = {p.dtype for n, p in model.named_parameters() if "moe_lora_" in n}
    assert adapter == {torch.float32 if autocast else dtype}
    out = model(input_ids(), labels=input_ids())
    assert out.logits.dtype == dtype and out.loss.isfinite()
    out.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_unload_gives_the_base_model_back():
    model = wrapped()
    base = model.unload()
    assert type(base) is transformers.LlamaForCausalLM
    assert base.state_dict().keys() == tiny_llama().state_dict().keys()
    assert torch.equal(logits(base), logits(tiny_llama()))


def test_training_moves_only_the_adapter():
    model = wrapped(top_k=2, lora_dropout=0.1, expert_dropout=0.1, router_jitter_noise=0.01, router_aux_loss_coef=0.01)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(input_ids(), labels=input_ids()).loss + model.moe_lora_aux_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) != ("moe_lora_" in n), n


def test_a_trainer_with_the_auxiliary_loss(tmp_path):
    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = loss + tuner.moe_lora_aux_loss(model, inputs["attention_mask"])
            return (loss, outputs) if return_outputs else loss

    model = wrapped(top_k=2, router_aux_loss_coef=0.01, router_z_loss_coef=0.001, task_type="CAUSAL_LM")
    rows = [{"input_ids": r, "labels": r, "attention_mask": torch.ones_like(r)} for r in input_ids(batch=8)]
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=4,
        activation_checkpointing=True,  # its default, use_reentrant=False, is the one that aux losses need
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-4")
    assert torch.equal(logits(again), logits(model.eval()))


# --- transformers' own integration ----------------------------------------------------------------------------------


def test_transformers_load_adapter(tmp_path):
    model = saved(tmp_path, router_bias=True)
    base = tiny_llama()
    base.load_adapter(tmp_path)
    assert torch.equal(logits(base), logits(model))


def test_transformers_load_adapter_reports_what_is_missing(tmp_path):
    """The load itself is transformers', which reports instead of raising, and never asks the tuner."""
    saved(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    del stored["base_model.model.model.layers.1.self_attn.q_proj.moe_lora_router.weight"]
    save_file(stored, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    info = tiny_llama().load_adapter(tmp_path)
    assert info.missing_keys == {"model.layers.1.self_attn.q_proj.moe_lora_router.default.weight"}


def test_transformers_from_pretrained_of_an_adapter_directory(tmp_path, base_dir):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir)
    model = peft.get_peft_model(base, config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.skipif(
    packaging.version.parse(peft.__version__) < packaging.version.parse("0.22"),
    reason="transformers 5.24's add_adapter, set_adapter, delete_adapter ask for PEFT >= 0.22, not yet released",
)
def test_transformers_add_adapter():
    base = tiny_llama()
    base.add_adapter(config(), "first")
    base.add_adapter(config(num_experts=2), "second")
    base.set_adapter("first")
    first = logits(base)
    base.set_adapter("second")
    assert not torch.equal(logits(base), first)
    base.delete_adapter("second")


# --- refusals --------------------------------------------------------------------------------------------------------

MERGE = "its router weighs the experts anew for every token.*unload\\(\\).*moe-lora export SRC DST --as lora"


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize(
    "merge",
    [
        lambda m: m.merge_and_unload(),
        lambda m: m.merge_adapter(),
        lambda m: m.base_model.model.model.layers[0].self_attn.q_proj.merge(),
        lambda m: m.base_model.model.model.layers[0].self_attn.q_proj.unmerge(),
    ],
    ids=["merge_and_unload", "merge_adapter", "layer", "unmerge"],
)
def test_merging_is_refused(merge, experts):
    model = wrapped(num_experts=experts)
    before = logits(model)
    with pytest.raises(ValueError, match=MERGE):
        merge(model)
    assert torch.equal(logits(model), before)


def test_add_weighted_adapter_is_refused():
    with pytest.raises(ValueError, match="cannot be combined with add_weighted_adapter.*moe-lora combine"):
        several().add_weighted_adapter(["first", "second"], [0.5, 0.5], "mixed")


def test_hot_swap_is_refused_by_peft_and_transformers(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    model = saved(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports .*LORA.* but MOE_LORA was passed"):
        hotswap_adapter(model, tmp_path, "default")
    base = tiny_llama()
    base.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        base.load_adapter(tmp_path, adapter_name="default", hotswap=True)


def test_mixing_peft_types_is_refused_by_peft():
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        wrapped().add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0", "adapter name '0' is a number, like the model's layers: PEFT would drop layer 0.*for example adapter_0"),
        ("mlp", "adapter name 'mlp' is also a part of this model's parameter names.*for example adapter_mlp"),
        ("weight", "adapter name 'weight' is also a part"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_adapter_names_that_peft_would_confuse(name, message, first):
    model = tiny_llama() if first else wrapped()
    with pytest.raises(ValueError, match=message):
        if first:
            peft.get_peft_model(model, config(), adapter_name=name)
        else:
            model.add_adapter(name, config())
    assert any(isinstance(m, MoeLoraLayer) for m in model.modules()) != first
    if not first:
        assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "'v_porj': no linear layer of this name is targeted; did you mean"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens': no linear layer of this name"),
        ({"target_modules": "nothing"}, "'nothing': no linear layer of this name"),
        (
            {"top_k": 2, "num_experts_pattern": {"q_proj": 2}, "top_k_pattern": {"q_proj": 3}},
            "q_proj: top_k: found 3",
        ),
        (
            {"r": [1, 2, 3], "num_experts_pattern": {"q_proj": 2}},
            "q_proj: r: found the list",
        ),
        (
            {"scope": "ffn"},
            "self_attn: found the layers .*, expected several, exactly one of which has the block's output",
        ),
    ],
)
def test_configs_that_do_not_fit_the_model_change_nothing(fields, message):
    model = tiny_llama()
    with pytest.raises(ConfigError, match=message):
        peft.get_peft_model(model, config(**fields))
    assert not any(isinstance(m, MoeLoraLayer) for m in model.modules())


@pytest.mark.parametrize("field", ["num_experts_pattern", "top_k_pattern", "rank_pattern", "alpha_pattern"])
def test_patterns_that_match_nothing_are_warned_of(field):
    with pytest.warns(RuntimeWarning, match=re.escape(f"{field} keys did not match any targeted module")):
        wrapped(**{field: {"no_such_layer": 2}})
