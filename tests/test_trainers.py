"""The trainers that PEFT users have: transformers Trainer, TRL, DDP, FSDP2 and ZeRO-3, ten steps or five each."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_peft_support import THIRD_PARTY_WARNINGS, config, input_ids, logits, tiny_llama
from text_models import SENTENCES, write_base
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from moe_lora_interop.peft_tuner import MoeLoraConfig, MoeLoraLayer, moe_lora_aux_loss
from moe_lora_interop.peft_tuner.trainer import AuxLossMixin, collected_aux_losses

pytestmark = [
    *THIRD_PARTY_WARNINGS,
    # trl 1.16 and transformers 5.24 use names that each other, or torch 2.13, has deprecated
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:multiprocess.*"),
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed:UserWarning"),
]

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None,
    reason="trl is not installed: pip install -c constraints.txt 'moe-lora-jax[test]'",
)

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {
    "task_type": "CAUSAL_LM",
    "num_experts": 4,
    "top_k": 2,
    "r": 4,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "router_aux_loss_coef": 0.02,
    "router_z_loss_coef": 0.001,
}
STEPS = 10


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def arguments(path: Path, **changes) -> dict:
    return {
        "output_dir": str(path),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    } | changes


def rows() -> list[dict]:
    """One batch, the second half of which is padded."""
    ids, mask = input_ids(4, 8), torch.ones(4, 8, dtype=torch.long)
    mask[2:, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)]


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The base model's tensors, by their names without an adapter."""
    names = {n.replace(".base_layer.", ".").removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    return {n: p.detach().clone() for n, p in names.items() if "moe_lora_" not in n}


def assert_trained_and_base_untouched(trainer: Trainer, before: dict[str, torch.Tensor]) -> None:
    seen = losses(trainer)
    assert len(seen) == STEPS and all(math.isfinite(loss) for loss in seen)
    assert seen[-1] < seen[0] - 0.02
    model = trainer.model
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "moe_lora_" in n and ".ref" not in n
    }
    after = frozen(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    moved = [m for m in model.modules() if isinstance(m, MoeLoraLayer) and m.moe_lora_B["default"].abs().max() > 0]
    assert len(moved) == 6
    fresh = [m.moe_lora_router["default"].weight for m in moved]
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in fresh)


class AuxTrainer(AuxLossMixin, Trainer):
    """What a user writes."""


def plain_trainer(path: Path, **changes) -> AuxTrainer:
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama(), MoeLoraConfig(**FIELDS))
    return AuxTrainer(model=model, args=TrainingArguments(**arguments(path, **changes)), train_dataset=rows())


def test_transformers_trainer(tmp_path):
    trainer = plain_trainer(tmp_path)
    before = frozen(trainer.model)
    trainer.train()
    assert_trained_and_base_untouched(trainer, before)


def test_the_mixin_adds_exactly_the_auxiliary_loss(tmp_path):
    trainer = plain_trainer(tmp_path)
    model, batch = trainer.model.train(), {k: torch.stack([r[k] for r in rows()]) for k in rows()[0]}
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    expected = outputs.loss + moe_lora_aux_loss(model, batch["attention_mask"])
    assert torch.equal(loss, expected) and loss > outputs.loss
    model.eval()
    with torch.no_grad():
        assert torch.equal(trainer.compute_loss(model, dict(batch)), model(**batch).loss)


def test_gradient_accumulation_gives_the_mean_over_the_steps(tmp_path):
    """Two accumulated steps have the gradient of the mean of their losses, auxiliary ones included."""
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = plain_trainer(tmp_path, **changes, learning_rate=0.0, max_grad_norm=0.0)
    data = [{k: row[k][:6] for k in row} for row in rows()]  # no padding: both halves have as many tokens
    trainer.train_dataset = data
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    model = trainer.model
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    accumulated: dict[str, torch.Tensor] = {}
    for name, parameter in trained.items():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: accumulated.update({name: p.grad.clone()}))
    trainer.train()
    found = dict(accumulated)
    model.zero_grad()
    for half in (data[:2], data[2:]):
        batch = {k: torch.stack([row[k] for row in half]) for k in half[0]}
        loss = model(**batch).loss + moe_lora_aux_loss(model, batch["attention_mask"])
        (loss / 2).backward()
    assert found.keys() == trained.keys()
    for name, parameter in trained.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_a_forward_of_the_reference_is_not_collected():
    model = peft.get_peft_model(tiny_llama(), config(router_aux_loss_coef=0.1)).train()
    with collected_aux_losses(model) as found:
        model(input_ids=input_ids())
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=input_ids())
    assert len(found) == 1 and found[0].requires_grad and found[0] > 0


@needs_trl
def test_trl_sft(tmp_path, base_dir):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Aux(AuxLossMixin, SFTTrainer):
        pass

    model = AutoModelForCausalLM.from_pretrained(base_dir)
    before = frozen(model)
    trainer = Aux(
        model=model,
        args=SFTConfig(**arguments(tmp_path, bf16=False, gradient_checkpointing=False)),
        train_dataset=Dataset.from_dict({"text": SENTENCES}),
        processing_class=AutoTokenizer.from_pretrained(base_dir),
        peft_config=MoeLoraConfig(**FIELDS),
    )
    trainer.train()
    assert_trained_and_base_untouched(trainer, before)
    trainer.save_model(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), tmp_path / "saved").eval()
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7, 8]])
        assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)


def dpo_trainer(path: Path, base: Path, model: torch.nn.Module, **kwargs):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Aux(AuxLossMixin, DPOTrainer):
        pass

    data = {"prompt": SENTENCES, "chosen": [" the cat"] * 4, "rejected": [" a dog"] * 4}
    return Aux(
        model=model,
        args=DPOConfig(**arguments(path, bf16=False, gradient_checkpointing=False, beta=0.5)),
        train_dataset=Dataset.from_dict(data),
        processing_class=AutoTokenizer.from_pretrained(base),
        **kwargs,
    )


@needs_trl
def test_trl_dpo_measures_from_the_base_model(tmp_path, base_dir):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    before = frozen(model)
    trainer = dpo_trainer(tmp_path, base_dir, model, peft_config=MoeLoraConfig(**FIELDS))
    reference: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def watch(module, args, kwargs, output):
        if not torch.is_grad_enabled():
            reference.append((kwargs["input_ids"], kwargs["attention_mask"], output.log_probs))

    handle = trainer.model.register_forward_hook(watch, with_kwargs=True)
    trainer.train()
    handle.remove()
    assert_trained_and_base_untouched(trainer, before)
    assert len(reference) == STEPS
    first = losses(trainer)[0]
    assert first > math.log(2)  # exactly the log of 2 while policy = reference, plus the auxiliary loss
    base = AutoModelForCausalLM.from_pretrained(base_dir).eval()
    for ids, mask, found in reference:
        with torch.no_grad():
            expected = base(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        expected = expected.gather(-1, ids[:, 1:, None])[..., 0]
        scored = found != 0  # TRL scores the completion only
        assert scored.any()
        torch.testing.assert_close(found[scored], expected[scored], rtol=1e-5, atol=1e-5)
    ids, mask, _ = reference[0]
    with torch.no_grad(), trainer.model.eval().disable_adapter():
        assert torch.equal(
            trainer.model(input_ids=ids, attention_mask=mask).logits, base(input_ids=ids, attention_mask=mask).logits
        )


@needs_trl
def test_trl_dpo_of_a_trained_adapter_measures_from_a_copy_of_it(tmp_path, base_dir):
    torch.manual_seed(0)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_dir), MoeLoraConfig(**FIELDS, init_lora_weights=False)
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        start = model.eval()(ids).logits
    trainer = dpo_trainer(tmp_path, base_dir, model)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=0.2)  # the adapter is far from the base model
    model.eval()
    with torch.no_grad():
        model.set_adapter("ref")
        assert torch.equal(model(ids).logits, start)
        model.set_adapter("default")
        assert not torch.equal(model(ids).logits, start)


# --- several processes -----------------------------------------------------------------------------------------------


def distributed(mode: str, out: Path) -> Path:
    """Runs tests/distributed_peft.py, in two processes unless `mode` is single; the directory that it saved."""
    launcher = [] if mode == "single" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *launcher, str(ROOT / "tests" / "distributed_peft.py"), mode, str(out / mode)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / mode


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return distributed("single", tmp_path_factory.mktemp("single"))


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed has no wheel and is not among the pinned packages: `make zero3` builds it and runs this test",
)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_two_processes_equal_one(tmp_path, single, mode):
    out = distributed(mode, tmp_path)
    report, expected = (json.loads((path / "report.json").read_text()) for path in (out, single))
    assert report["changed"] == []
    assert report["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (out, single))
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6)
    reloaded = peft.PeftModel.from_pretrained(tiny_llama(), out).eval()
    again = peft.PeftModel.from_pretrained(tiny_llama(), single).eval()
    torch.testing.assert_close(logits(reloaded), logits(again), rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits(reloaded), logits(tiny_llama()))


def test_a_router_can_be_a_sharded_unit_of_its_own(tmp_path):
    """PEFT's fsdp_auto_wrap_policy makes one of every trainable layer: its weight is whole only while it is called."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model = peft.get_peft_model(tiny_llama(), config())
    expected = logits(model.eval())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for name, module in model.named_modules():
            if name.endswith("moe_lora_router.default"):
                fully_shard(module)
        torch.testing.assert_close(logits(model), expected)
    finally:
        dist.destroy_process_group()


# --- nobody adds the auxiliary loss ----------------------------------------------------------------------------------

NOBODY = r"adapter 'default' has router_aux_loss_coef 0\.02 .*moe_lora_aux_loss\(attention_mask\).*AuxLossMixin"


def loud():
    return pytest.warns(UserWarning, match=NOBODY)


def checkpointed(model, how):
    """The model with gradient checkpointing of this kind, or without."""
    if how != "off":
        model.activation_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant", "reentrant"])
def test_a_plain_trainer_is_told_once_that_it_ignores_the_auxiliary_loss(tmp_path, checkpointing):
    model = checkpointed(peft.get_peft_model(tiny_llama(), MoeLoraConfig(**FIELDS)), checkpointing)
    trainer = Trainer(model=model, args=TrainingArguments(**arguments(tmp_path)), train_dataset=rows())
    with loud() as found:
        trainer.train()
    assert len([w for w in found if "moe_lora_aux_loss" in str(w.message)]) == 1


@pytest.mark.parametrize("scope", ["linear", "ffn", "model"])
def test_a_loop_is_told_with_its_first_backward_pass(scope):
    targets = ["gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(tiny_llama(), MoeLoraConfig(**FIELDS | {"scope": scope, "target_modules": targets}))
    loss = model.train()(input_ids(), labels=input_ids()).loss
    with loud():
        loss.backward()
    model(input_ids(), labels=input_ids()).loss.backward()  # and no more


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}], ids=str)
@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant"])
def test_the_mixin_is_not_told(tmp_path, changes, checkpointing):
    trainer = plain_trainer(tmp_path, max_steps=2, **changes)
    checkpointed(trainer.model, checkpointing)
    for _ in range(2):  # warnings are errors
        trainer.train()
        trainer.evaluate(rows())


def test_a_loop_that_adds_the_loss_is_not_told():
    model = peft.get_peft_model(tiny_llama(), MoeLoraConfig(**FIELDS))
    for _ in range(2):
        two = []
        for _ in range(2):  # two forwards for one backward pass
            loss = model.train()(input_ids(), labels=input_ids()).loss
            two.append(loss + moe_lora_aux_loss(model))
        model.eval().generate(input_ids(), max_new_tokens=2, min_new_tokens=2)
        sum(two).backward()
    nothing = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    model = peft.get_peft_model(tiny_llama(), MoeLoraConfig(**FIELDS | nothing))
    model.train()(input_ids(), labels=input_ids()).loss.backward()


# --- encoder-decoders ------------------------------------------------------------------------------------------------


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = dict(vocab_size=97, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, dropout_rate=0.0)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)), "qkvo", ["wi", "wo"]


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    sizes = dict(vocab_size=97, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_layers=1, decoder_layers=1, dropout=0.0)
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads, pad_token_id=0, decoder_start_token_id=2))
    return model, ["q_proj", "k_proj", "v_proj", "out_proj"], ["fc1", "fc2"]


def sees_the_encoder(name: str) -> bool:
    cross = "EncDecAttention" in name or "encoder_attn" in name
    return ".encoder." in name or (cross and name.split(".")[-1] in ("k", "v", "k_proj", "v_proj"))


@pytest.mark.parametrize("base", [t5, bart])
@pytest.mark.parametrize("decoder", ["mask", "labels", "mask and other labels", "neither"])
@pytest.mark.parametrize("same_length", [True, False])
def test_encoder_decoders(base, decoder, same_length):
    model, attention, block = base()
    fields = {
        "target_modules": [*attention, *block],
        "top_k": 2,
        "router_aux_loss_coef": 0.5,
        "init_lora_weights": False,
    }
    model = peft.get_peft_model(model, MoeLoraConfig(num_experts=4, r=2, task_type="SEQ_2_SEQ_LM", **fields))
    for name, parameter in model.named_parameters():
        if "router" in name:
            torch.nn.init.normal_(parameter)
    ids, targets = input_ids(3, 8), input_ids(3, 8 if same_length else 5)
    mask, target_mask = torch.ones_like(ids), torch.ones_like(targets)
    mask[1:, 6:], target_mask[:2, 3:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": targets}
    if decoder == "neither":
        batch["decoder_input_ids"] = batch.pop("labels")
        target_mask[:] = 1
    elif decoder == "labels":
        batch["labels"] = targets.masked_fill(target_mask == 0, -100)
    else:
        batch["decoder_attention_mask"] = target_mask
    if decoder == "mask and other labels":
        batch["labels"] = targets.masked_fill(torch.arange(targets.shape[1]) == 1, -100)

    with collected_aux_losses(model.train()) as found:
        model(**batch)
    by_hand = []
    for name, layer in model.named_modules():
        if isinstance(layer, MoeLoraLayer) and layer.moe_lora_routing:
            real = (mask if sees_the_encoder(name) else target_mask).flatten().bool()
            z = layer.moe_lora_routing["default"].logits
            assert len(z) == len(real)
            p, best = z[real].softmax(-1), z[real].topk(2).indices
            f = torch.nn.functional.one_hot(best, 4).sum(1).float().mean(0)
            by_hand.append(4 * (f * p.mean(0)).sum())
    assert len(by_hand) == {t5: 32, bart: 16}[base]
    torch.testing.assert_close(found[0], 0.5 * torch.stack(by_hand).mean())
