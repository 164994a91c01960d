"""Adapters that other programs wrote, converted to native and run in PEFT: their own logits, saved bit for bit."""

from contextlib import nullcontext

import peft
import pytest
import torch
import transformers
from test_peft_support import THIRD_PARTY_WARNINGS

import moe_lora_interop
import moe_lora_interop.peft_tuner  # noqa: F401  (registers the method)
from tests.peers_data import READABLE, WITH_LOGITS, Peer
from tests.test_peers import assert_identical

pytestmark = [*THIRD_PARTY_WARNINGS, pytest.mark.filterwarnings("ignore:.*left out. ")]
named = pytest.mark.parametrize("peer", READABLE, ids=lambda p: p.name)
with_logits = pytest.mark.parametrize("peer", WITH_LOGITS, ids=lambda p: p.name)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """peer -> the directory that holds it in native form, made once."""
    made = {}

    def directory(peer: Peer):
        if peer.name not in made:
            made[peer.name] = tmp_path_factory.mktemp("native")
            moe_lora_interop.write(moe_lora_interop.read(peer.directory, **peer.options), made[peer.name])
        return made[peer.name]

    return directory


def base(peer: Peer) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(peer.base, dtype=torch.float32).eval()


def logits(model, peer: Peer, ids: str = "task_ids") -> torch.Tensor:
    reference = peer.reference
    with torch.no_grad():
        if ids not in reference:
            return model(torch.tensor(reference["input_ids"])).logits
        with model.base_model.task_routing(reference[ids]):
            return model(torch.tensor(reference["input_ids"])).logits


@with_logits
def test_peft_gives_the_peers_own_logits(peer, native):
    model = peft.PeftModel.from_pretrained(base(peer), native(peer))
    expected = torch.tensor(peer.reference["logits"])
    # LD-MoLE's temperature goes down to 0.01, which multiplies its own rounding: its provenance says 2e-4
    torch.testing.assert_close(logits(model, peer), expected, atol=2e-4 if "sparsegen" in peer.name else 1e-4, rtol=0)


def test_several_task_ids_are_averaged_as_the_peer_does(native):
    peer = Peer("moelora/adapter")
    model = peft.PeftModel.from_pretrained(base(peer), native(peer))
    expected = torch.tensor(peer.reference["multi_logits"])
    torch.testing.assert_close(logits(model, peer, "multi_task_ids"), expected, atol=1e-4, rtol=0)


@named
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu"])
def test_loaded_and_saved_again_it_is_the_same_adapter(peer, native, tmp_path, low_cpu_mem_usage):
    model = peft.PeftModel.from_pretrained(base(peer), native(peer), low_cpu_mem_usage=low_cpu_mem_usage)
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # else PEFT looks for their base model, "../base"
    assert_identical(moe_lora_interop.read(tmp_path), moe_lora_interop.read(native(peer)))


@pytest.mark.filterwarnings("ignore:.*cannot learn")  # one of mola's layers has a top-1 router
@with_logits
def test_five_training_steps_lower_the_loss(peer, native):
    model = peft.PeftModel.from_pretrained(base(peer), native(peer), is_trainable=True).eval()  # without dropout
    ids = torch.tensor(peer.reference["input_ids"])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    tasks = peer.reference.get("task_ids")
    for _ in range(6):
        with nullcontext() if tasks is None else model.base_model.task_routing(tasks):
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in trained)
